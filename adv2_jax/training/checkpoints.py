"""Checkpoints of a run: its latest state and its settings, in a folder.

Orbax writes arrays and JSON under a temporary name and renames the folder at the end, so a killed
run leaves the previous checkpoint. Reading never unpickles.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from adv2_jax.errors import first_line
from adv2_jax.identity import changes

Tree = TypeVar("Tree")


class Checkpoints:
    """The latest state of one run, in a folder of its own.

    Args:
        folder: where checkpoints are written; made when the first is saved.
        settings: numbers, booleans and strings by name; a run resumes only from a checkpoint with
            equal settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]):
        import orbax.checkpoint  # here, since it takes a second that other commands need not wait

        self._folder, self._settings = Path(folder).absolute(), dict(settings)
        self._args = orbax.checkpoint.args
        self._manager = orbax.checkpoint.CheckpointManager(
            self._folder,
            options=orbax.checkpoint.CheckpointManagerOptions(
                max_to_keep=1,
                create=False,  # a run that fails before its first checkpoint leaves no folder
                cleanup_tmp_directories=True,  # what a killed run left half written
                # steps donate the state, which an asynchronous writer would still read
                enable_async_checkpointing=False,
            ),
        )

    def begin(self, state: Tree, *, resume: bool) -> tuple[int, Tree]:
        """Return the number of steps done and the state to continue from.

        These are 0 and `state` for a new run, else those of the checkpoint.

        Args:
            state: pytree of arrays at step 0; gives the structure, shapes and types of the
                checkpoint.
            resume: whether to continue. Starting and resuming are both explicit, so that a
                forgotten flag can neither overwrite a run nor continue one.

        Raises:
            ValueError: names the folder: there is a checkpoint although `resume` is False, none
                although it is True, one with other settings (lists the changes), or one that cannot
                be read.
        """
        step = self._manager.latest_step()
        if resume and step is None:
            raise ValueError(f"nothing to resume: {self._folder} holds no checkpoint")
        if not resume and step is not None:
            raise ValueError(
                f"{self._folder} holds a run at step {step}: resume it (--resume), or remove the folder to start anew"
            )
        if step is None:
            return 0, state
        # before the state, which cannot be restored where its shapes changed with a setting
        was = self._read(step, settings=self._args.JsonRestore())["settings"]
        if changed := changes(was, self._settings):
            raise ValueError(f"cannot resume {self._folder} with other settings: {changed}")
        # as NumPy arrays: they are bound to no device, so a resumed run has the programs of a new one
        template = jax.tree.map(np.asarray, state)
        return step, self._read(step, state=self._args.StandardRestore(template))["state"]

    def save(self, step: int, state: Any) -> None:
        """Write the state after `step` steps, then remove the checkpoint before.

        Ctrl-C waits until that is done.
        """
        items = {
            "state": self._args.StandardSave(state),
            "settings": self._args.JsonSave(self._settings),
        }
        # Ctrl-C interrupts the main thread only; inside orbax it would end in many tracebacks
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._manager.save, step, args=self._args.Composite(**items)).result()

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._args.Composite(**items))
        # orbax, tensorstore and json each raise their own errors for a damaged checkpoint
        except Exception as error:
            # tensorstore appends its whole specification of the array, in JSON
            reason = first_line(error).partition(" [tensorstore_spec")[0]
            raise ValueError(
                f"cannot read checkpoint {self._folder / str(step)}: {reason}"
            ) from None
