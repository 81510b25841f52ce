"""The public names for type checkers; at run time ``__init__.py`` imports each on first use."""

from visattn import metrics as metrics
from visattn.blocks.catalog import BLOCKS as BLOCKS
from visattn.blocks.catalog import create_block as create_block
from visattn.blocks.reference import load_reference as load_reference
from visattn.core.attention import RELATIONS as RELATIONS
from visattn.core.formula import Plan as Plan
from visattn.core.formula import attend as attend
from visattn.core.formula import attention_map as attention_map
from visattn.core.formula import plan as plan
from visattn.core.normalize import NORMALIZERS as NORMALIZERS
from visattn.core.similarity import SIMILARITIES as SIMILARITIES
from visattn.data.module import ImageData as ImageData
from visattn.draw.files import save_maps as save_maps
from visattn.draw.overlay import overlay as overlay
from visattn.draw.page import page as page
from visattn.map import Map as Map
from visattn.methods.explain import METHODS as METHODS
from visattn.methods.explain import explain as explain
from visattn.methods.rollout import rollout as rollout
from visattn.models.presets import MODELS as MODELS
from visattn.models.presets import create_model as create_model
from visattn.record import Maps as Maps
from visattn.record import Record as Record
from visattn.record import capture as capture
from visattn.surgery import insert as insert
from visattn.surgery import remove as remove
from visattn.surgery import replace as replace
from visattn.training.classifier import Classifier as Classifier
from visattn.training.classifier import load_classifier as load_classifier

__version__: str
__all__: list[str]
