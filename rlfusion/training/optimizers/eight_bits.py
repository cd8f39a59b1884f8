"""AdamW with moments in 8 bits, of the package bitsandbytes, or one line where it cannot be used."""

from rlfusion.common.errors import ConfigError

try:
    from bitsandbytes.optim import AdamW8bit
except (ImportError, RuntimeError, OSError) as error:
    raise ConfigError(
        f"optimizer = adamw8bit needs the package bitsandbytes, which cannot be used here ({error}): "
        "pip install 'rlfusion[adam8bit]', or expected adamw"
    ) from error

__all__ = ["AdamW8bit"]
