"""Models, and what any other model must offer to take their place (`base`)."""

from .base import Cache as Cache
from .base import Critic as Critic
from .base import Decoder as Decoder
from .base import DecodingPolicy as DecodingPolicy
from .base import FromSlot as FromSlot
from .base import GrowingPolicy as GrowingPolicy
from .base import Policy as Policy
from .heads import LanguageModel as LanguageModel
from .heads import ValueHead as ValueHead
from .heads import ValueModel as ValueModel
from .transformer import RopeScaling as RopeScaling
from .transformer import Transformer as Transformer
from .transformer import TransformerConfig as TransformerConfig
