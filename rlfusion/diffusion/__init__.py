"""The mathematics: schedules, kinds, kernels, denoisers, policies and their chains."""
