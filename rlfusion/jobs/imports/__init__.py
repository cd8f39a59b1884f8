"""``rlfusion import-config``: settings of programs that are gone, one by one, as settings of ``finetune``.

table         what a row of such a program says of one of its settings
trl           TRL's DDPOConfig and AlignPropConfig, with the arguments of its example scripts
ddpo_pytorch  the ml_collections of ddpo-pytorch
reading       the files: YAML, JSON, Python, words of a command line
job           the whole, written as YAML
"""

from rlfusion.jobs.imports.job import PROGRAMS, import_config, imported, table_of

__all__ = ["PROGRAMS", "import_config", "imported", "table_of"]
