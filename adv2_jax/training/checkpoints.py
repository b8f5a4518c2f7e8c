"""Checkpoints of a run: its latest state in a folder, and the settings it was made with.

Orbax writes arrays and JSON, under a name of its own until all of it is there: a kill leaves the
checkpoint before, and reading one never unpickles.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from adv2_jax.errors import first_line
from adv2_jax.identity import changes

Tree = TypeVar("Tree")


class Checkpoints:
    """The latest state of one run, in a folder of its own.

    Args:
        folder: where it is kept; made when it is first saved.
        settings: numbers, booleans and strings by name; a run goes on from a checkpoint of equal
            settings only.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]):
        import orbax.checkpoint  # takes a second: only where it is used

        self._folder, self._settings = Path(folder).absolute(), dict(settings)
        self._args = orbax.checkpoint.args
        options = orbax.checkpoint.CheckpointManagerOptions(
            max_to_keep=1,
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        self._manager = orbax.checkpoint.CheckpointManager(self._folder, options=options)

    def begin(self, state: Tree, *, resume: bool) -> tuple[int, Tree]:
        """The number of steps done and the state to go on from: 0 and `state`, or those of the
        checkpoint.

        Args:
            state: pytree of arrays at step 0; says the structure, shapes and types of the
                checkpoint.
            resume: whether to go on. Both ways must be said, so that a forgotten word neither
                continues a run nor costs one.

        Raises:
            ValueError: names the folder: there is a checkpoint although `resume` is False, none
                although it is True, one made with other settings (each is named with what it was
                and is), or one that cannot be read.
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
        self._check(self._read(step, settings=self._args.JsonRestore())["settings"])
        return step, self._read(step, state=self._args.StandardRestore(state))["state"]

    def save(self, step: int, state: Any) -> None:
        """Write the state after `step` steps, then remove the one before; Ctrl-C waits until that is done."""
        parts = {
            "state": self._args.StandardSave(state),
            "settings": self._args.JsonSave(self._settings),
        }
        # Ctrl-C strikes the main thread only; in orbax it would leave a trail of tracebacks
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._manager.save, step, args=self._args.Composite(**parts)).result()

    def _read(self, step: int, **parts: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._args.Composite(**parts))
        except (
            Exception
        ) as error:  # orbax, tensorstore and json each raise their own on a damaged checkpoint
            reason = first_line(error).partition(" [tensorstore_spec")[0]
            raise ValueError(
                f"cannot read checkpoint {self._folder / str(step)}: {reason}"
            ) from None

    def _check(self, was: Mapping[str, Any]) -> None:
        if changed := changes(was, self._settings):
            raise ValueError(f"cannot resume {self._folder} with other settings: {changed}")
