"""Checkpoints: a state as a folder that is either whole or not there.

    step-00000020/
        <key>.safetensors   the tensors below each top-level key of the state
        state.json          its structure and scalars; floats, int keys and tuples come back exactly
        manifest.json       the step, the run, a digest of its settings (all three are in state.json too), SHA-256 and
                        size of each file, the numerics fingerprint, and a SHA-256 of itself

A checkpoint is written under a temporary name, each file fsynced, the folder renamed, its parent fsynced, and then read
again and verified. The newest that verifies wins; one that does not is renamed ``*.corrupt`` and named, and so is one
whose name is not its step; one of another run, or of settings that the run never had, is renamed ``*.foreign``. A
process that dies at any moment leaves the previous checkpoint as it was. One process at a time writes to a folder;
nothing is ever unpickled.
"""

from rlfusion.training.checkpoint.disk import candidates, set_aside, write_json_atomic
from rlfusion.training.checkpoint.keep import NEWEST, Keep
from rlfusion.training.checkpoint.manifest import MALFORMED, NOBODY, CheckpointError, Owner, verify
from rlfusion.training.checkpoint.saving import Found, latest, load, loading, newest_manifest, save
from rlfusion.training.checkpoint.writer import Writer

__all__ = [
    "MALFORMED",
    "NEWEST",
    "NOBODY",
    "CheckpointError",
    "Found",
    "Keep",
    "Owner",
    "Writer",
    "candidates",
    "latest",
    "load",
    "loading",
    "newest_manifest",
    "save",
    "set_aside",
    "verify",
    "write_json_atomic",
]
