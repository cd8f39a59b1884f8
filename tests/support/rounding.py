"""How far one float32 computation through a network may be from the same one by other kernels, batches or versions.

A sum of n products is off by about eps sqrt(n) times its condition, eps = 6e-8: some 1e-6 a layer for widths of 100 and
1e-5 through a few layers with norms, more where terms cancel. Other CPUs, other threads and other sizes of batch take
other kernels and add in another order, so a tolerance near eps holds on the machine where it was written alone. Where a
test is of the algebra and not of the network, compare in float64.
"""

ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
