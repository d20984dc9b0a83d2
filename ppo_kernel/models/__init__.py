"""Models, and what any other model must offer to take their place (`protocol`)."""

from .heads import LanguageModel as LanguageModel
from .heads import ValueHead as ValueHead
from .heads import ValueModel as ValueModel
from .protocol import Cache as Cache
from .protocol import Critic as Critic
from .protocol import Decoder as Decoder
from .protocol import Policy as Policy
from .transformer import RopeScaling as RopeScaling
from .transformer import Transformer as Transformer
from .transformer import TransformerConfig as TransformerConfig
