"""Pipeline-parallel training, exact to the bit."""

from gpipe import testing as testing
from gpipe.distributed import DistributedGPipe
from gpipe.phase import is_checkpointing, is_recomputing
from gpipe.pipe import GPipe
from gpipe.recording import record
from gpipe.rng import cell_seed
from gpipe.saving.saves import Restored, Saves
from gpipe.schedule import Action, Kind, Schedule, ScheduleError
from gpipe.simulate import StageCost, simulate
from gpipe.timeline import Span, Timeline

__all__ = [
    "Action",
    "DistributedGPipe",
    "GPipe",
    "Kind",
    "Restored",
    "Saves",
    "Schedule",
    "ScheduleError",
    "Span",
    "StageCost",
    "Timeline",
    "cell_seed",
    "is_checkpointing",
    "is_recomputing",
    "record",
    "simulate",
]

__version__ = "0.1.0"
