from .lora import *
from .scorers import *
from .allocators import *
from .data import *
from .learner import *
from .calibration import *
from .report import *
from .artifacts import *
