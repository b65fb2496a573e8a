"""vLLM's sleep mode: what is published is taken back before the weights go, and offered again when they are back.

A thin coat around vLLM's own default backend. On a CPU vLLM has no sleep mode, and calls no backend.
"""

from __future__ import annotations

from vllm.device_allocator.sleep_mode_backend import CuMemBackend, SleepModeBackend

from weightwire.engines.vllm.serving import Serving, process_serving


class PublishingSleepBackend(SleepModeBackend):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Frees and restores as ``inner`` does; nobody reads in between.

    Args:
        inner: does the work; vLLM's default where ``None``.
        serving: what is published; this process's where ``None``.
    """

    def __init__(self, inner: SleepModeBackend | None = None, serving: Serving | None = None) -> None:
        super().__init__()
        self._inner = inner or CuMemBackend()
        self._serving = serving or process_serving()

    def suspend(self, level: int = 1) -> None:
        """Level 1 keeps the weights elsewhere: the publication pauses. Level 2 drops them: it ends."""
        if level == 1:
            self._serving.pause()
        else:
            self._serving.withdraw()
        self._inner.suspend(level)

    def resume(self, tags: list[str] | None = None) -> None:
        """Restore; once the weights are back, and found to be what they were, they are offered again."""
        self._inner.resume(tags)
        if tags is None or "weights" in tags:
            self._serving.resume()

    def discard(self, tags: tuple[str, ...]) -> None:
        """Weights that are discarded are no longer published."""
        if "weights" in tags:
            self._serving.withdraw()
        self._inner.discard(tags)

    def state(self) -> str:
        """As ``inner`` says."""
        found: str = self._inner.state()
        return found

    @classmethod
    def is_supported(cls) -> bool:
        """As vLLM's default."""
        return bool(CuMemBackend.is_supported())

    @classmethod
    def preserves_communicators(cls) -> bool:
        """As vLLM's default."""
        return bool(CuMemBackend.preserves_communicators())

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        """As vLLM's default."""
        return bool(CuMemBackend.preserves_compiled_artifacts())

    @classmethod
    def preserves_graphs_with_communicators(cls) -> bool:
        """As vLLM's default."""
        return bool(CuMemBackend.preserves_graphs_with_communicators())
