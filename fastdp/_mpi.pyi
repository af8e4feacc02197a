from collections.abc import Callable
from typing import Any

from torch import Tensor

__version__: str
built_for: str  # "MPICH" or "Open MPI": whose binary interface was compiled in
dtypes: tuple[str, ...]  # names of torch dtypes; the index is the code
summable_dtypes: tuple[str, ...]
algorithms: tuple[str, ...]
operations: tuple[str, ...]
max_local_ranks: int
max_segments: int

def loaded_library() -> str:
    """What MPI_Get_library_version says in this module; may be called before MPI_Init."""

def unfinished() -> bool:
    """Whether a communicator is gone whose peers MPI_Finalize would wait for."""

def process(id: int) -> tuple[int, int]:
    """A process of this host: its number, and when it began."""

def team_bytes(ranks: int) -> int:
    """What the ranks of a host need to meet."""

def sum_in_place(tensors: list[int], begin: int, end: int) -> None:
    """For benchmarks: elements [begin, end) of float32 tensors become their sum in each."""

class SharedMemory:
    """csrc/comm/shared_memory.h; a buffer, once it is mapped."""

    @staticmethod
    def create(bytes: int) -> SharedMemory: ...
    @staticmethod
    def open(owner: int, file: int, bytes: int) -> SharedMemory: ...
    def reserve(self, begin: int, bytes: int) -> None: ...
    def map(self) -> None: ...
    def touch(self) -> None: ...
    def close_file(self) -> None: ...
    @property
    def file(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def row_outside(indices: int, count: int, table: int) -> int:
    """The place of the first of `count` indices (int64, at that address) that is not in [0, table), or count."""

class RowSum:
    """csrc/comm/sparse.h: the sum of lists of rows of a table: addresses of indices, how many, addresses of values."""

    def __init__(self, lists: list[tuple[int, int, int]], table: int) -> None: ...
    @property
    def count(self) -> int: ...
    def write(self, width: int, wide: bool, indices: int, sums: int) -> None:
        """wide: whether values and sums are float64, not float32"""

class Communicator:
    """The collectives of csrc/comm/communicator.h. Raises CommError; releases the GIL while waiting.

    written, others: kept until the collective has ended; then the version of `written` is incremented.
    """

    def __init__(self, fortran_handle: int, timeout: float, segment_bytes: int) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def failure(self) -> str: ...
    @property
    def pending(self) -> bool: ...
    @property
    def noted(self) -> bool: ...
    def set_note(self, note: bool) -> None: ...
    def leave(self) -> None:
        """This rank's program ends."""
    def forked(self) -> None:
        """In a process that was forked from this rank: no rank itself."""
    def share_cores(self) -> None:
        """Ranks outnumber cores: waits sleep at once instead of yielding first."""
    def fail(self, reason: str) -> None: ...
    def leave_rows(self, rows: tuple[int, int, int], row_bytes: int) -> None:
        """Where ranks that share memory find them; between two meetings. rows: addresses as of RowSum's lists."""
    def rows_left(self, row_bytes: int) -> list[tuple[int, int, int]]:
        """After the second: of all ranks, or none if some have no room."""
    def join(self, host: list[int], memory: SharedMemory, processes: list[tuple[int, int]]) -> None: ...
    def segments(self) -> list[int]:
        """The numbers of those of which this rank has tensors."""
    def add_segment(self, memory: SharedMemory, number: int, part_bytes: int, local_rank: int) -> None: ...
    def shared_sum(self, tensor: type, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """all_reduce(x) in place, at once; where that is not what is asked for, otherwise(...)."""
    def sum(
        self,
        operation: int,
        data: int,
        out: int,
        count: int,
        dtype: int,
        algorithm: int,
        written: Tensor,
        others: object,
        later: bool,
    ) -> int:
        """later: start it only; its number, for test and wait, is returned."""
    def all_gather(
        self, part: int, count: int, dtype: int, out: int, result: Callable[[int], int], others: object
    ) -> None:
        """out: elements of the caller's result, or -1; result(elements) returns the address to write to."""
    def broadcast(self, data: int, count: int, dtype: int, root: int, written: Tensor) -> None: ...
    def meet(self, operation: int, count: int, dtype: int, width: int) -> None: ...
    def test(self, sequence: int) -> bool: ...
    def wait(self, sequence: int) -> None: ...
