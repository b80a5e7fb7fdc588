"""What our Ray Data pipelines share: a datasource of plain functions, and how blocks are ordered and sized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pyarrow as pa
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

Read = Callable[[], Iterable[pa.Table]]


class Tasks(Datasource):
    """A datasource of read functions, one a task, each yielding tables. They are pickled: they hold plain data."""

    def __init__(self, name: str, reads: Sequence[Read], task_bytes: int) -> None:
        super().__init__()
        self._name, self.reads, self._bytes = name, reads, task_bytes

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        return self._bytes * len(self.reads)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=self._bytes, input_files=None, exec_stats=None)
        return [ReadTask(read, metadata, per_task_row_limit=per_task_row_limit) for read in self.reads]


def data_context(target_bytes: int | None) -> DataContext:
    """Settings of a pipeline: blocks in order, silent, each block as its task made it (None) or cut to a target."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = target_bytes
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context
