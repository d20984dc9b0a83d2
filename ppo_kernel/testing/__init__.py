"""Judges for our tests and for yours: of a function, and of a policy. Needs the `test` extra."""

from .functions import EXTREME_LOG_RATIOS as EXTREME_LOG_RATIOS
from .functions import EXTREME_LOGITS as EXTREME_LOGITS
from .functions import NORM_TOLERANCES as NORM_TOLERANCES
from .functions import SHAPES as SHAPES
from .functions import TOLERANCES as TOLERANCES
from .functions import Tolerance as Tolerance
from .functions import assert_matches as assert_matches
from .functions import log_ratios as log_ratios
from .functions import logits as logits
from .functions import masks as masks
from .functions import reals as reals
from .functions import repadded_responses as repadded_responses
from .functions import token_ids as token_ids
from .policies import check_policy as check_policy
