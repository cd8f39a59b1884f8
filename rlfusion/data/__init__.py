"""Data: samples in [-1, 1] as (N, C, H, W) float32, with a label or a caption each; read as people have them."""

from rlfusion.common.tensors import to_pixels as to_pixels
from rlfusion.data.dataset import Dataset as Dataset
from rlfusion.data.dataset import batch_indices as batch_indices
from rlfusion.data.dataset import captioned as captioned
from rlfusion.data.dataset import digits as digits
from rlfusion.data.folder import Folder as Folder
from rlfusion.data.folder import folder as folder
from rlfusion.data.hub import HF as HF
from rlfusion.data.images import read_image as read_image
from rlfusion.data.npz import Npz as Npz
from rlfusion.data.npz import npz as npz
from rlfusion.data.sources import load as load
from rlfusion.data.sources import name_of as name_of
from rlfusion.data.table import Table as Table
