"""The settings of ``rlfusion import-config``."""

from dataclasses import dataclass

from rlfusion.config.parts import require_output


@dataclass(frozen=True)
class ImportConfig:
    """Make settings of finetune from another program's: rlfusion import-config trl FILE.

    Attributes:
        program: trl (DDPOConfig or AlignPropConfig, as the file says), trl-ddpo, trl-alignprop, or ddpo-pytorch.
        file: its settings: .yaml, .json, .py (a call of the class; of ddpo-pytorch config.py or config.py:FUNCTION), or
            the words of its command line, .sh or .txt.
        out: the YAML file to write; empty prints it.
    """

    program: str
    file: str
    out: str = ""

    def __post_init__(self) -> None:
        if self.out:
            require_output("out", self.out, (".yaml", ".yml"))
