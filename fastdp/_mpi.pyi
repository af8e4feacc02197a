from collections.abc import Callable

__version__: str
built_for: str  # "MPICH" or "Open MPI": whose binary interface was compiled in
dtypes: tuple[str, ...]  # names of torch dtypes; the index is the code
summable_dtypes: tuple[str, ...]
algorithms: tuple[str, ...]

def loaded_library() -> str:
    """What MPI_Get_library_version says in this module; may be called before MPI_Init."""

class Communicator:
    """The collectives of csrc/comm/communicator.h. Raises CommError; releases the GIL while waiting."""

    def __init__(self, fortran_handle: int, timeout: float, segment_bytes: int) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def failure(self) -> str: ...
    @property
    def pending(self) -> bool: ...
    def all_reduce(self, data: int, count: int, dtype: int, algorithm: int) -> None: ...
    def reduce_scatter(self, data: int, count: int, dtype: int) -> None: ...
    def all_gather(self, part: int, count: int, dtype: int, out: int, result: Callable[[int], int]) -> None:
        """out: elements of the caller's result, or -1; result(elements) returns the address to write to."""
    def broadcast(self, data: int, count: int, dtype: int, root: int) -> None: ...
    def share_cores(self) -> None:
        """Ranks outnumber cores: waits sleep at once instead of yielding first."""
    def barrier(self) -> None: ...
