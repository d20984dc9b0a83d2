"""Models, and what any other model must offer to take their place (`protocol`)."""

from .config import LayerSpec as LayerSpec
from .config import TransformerConfig as TransformerConfig
from .heads import LanguageModel as LanguageModel
from .heads import ValueHead as ValueHead
from .heads import ValueModel as ValueModel
from .protocol import Cache as Cache
from .protocol import Critic as Critic
from .protocol import Decoder as Decoder
from .protocol import Policy as Policy
from .rotary import Rope as Rope
from .rotary import RopeScaling as RopeScaling
from .transformer import Transformer as Transformer
