VERSION: str
COMMIT: str
TORCH_AT_BUILD: str
CUDA_COMPILER: str
CUDA_ARCHITECTURES: tuple[str, ...]
CPU_ARCHITECTURE: str
HIGHEST_TEMPERATURES: tuple[float, float]
SUM_ROWS: tuple[str, ...]
EXTREME_ROWS: tuple[str, ...]
MEAN_ROWS: tuple[str, ...]
STATISTIC_SUMS: int
STATISTIC_EXTREMES: int
SEQUENCE_TOTALS: int
COMPONENT_MEAN_ROWS: tuple[str, ...]
REPLAY_ROWS: tuple[str, ...]
HISTOGRAM_BINS: int
