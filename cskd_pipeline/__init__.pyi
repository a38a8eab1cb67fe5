from cskd_pipeline.cache.manifest import TeacherInfo as TeacherInfo
from cskd_pipeline.cache.reader import Cache as Cache
from cskd_pipeline.cache.reader import open_cache as open_cache
from cskd_pipeline.config.sections import CacheSection as CacheSection
from cskd_pipeline.data.cached_loader import CachedBatch as CachedBatch
from cskd_pipeline.data.cached_loader import CachedLoader as CachedLoader
from cskd_pipeline.data.full_batches import TeacherViews as TeacherViews
from cskd_pipeline.data.replay import replay_view as replay_view
from cskd_pipeline.data.training_views import TrainingViews as TrainingViews
from cskd_pipeline.data.training_views import open_views as open_views
from cskd_pipeline.data.unit_views import Loading as Loading
from cskd_pipeline.distill.ckf import ckf_ratio as ckf_ratio
from cskd_pipeline.distill.encodings import register_encoding as register_encoding
from cskd_pipeline.distill.encodings.base import Encoding as Encoding
from cskd_pipeline.distill.losses import DistillationLoss as DistillationLoss
from cskd_pipeline.distill.losses import LossParts as LossParts
from cskd_pipeline.distill.targets import LogitTargets as LogitTargets
from cskd_pipeline.distill.targets import Targets as Targets
from cskd_pipeline.errors import CskdError as CskdError
from cskd_pipeline.models.student import Heads as Heads
from cskd_pipeline.models.student import dense_logits as dense_logits
from cskd_pipeline.models.student import inference_logits as inference_logits
from cskd_pipeline.pipeline.unit_writer import UnitWriter as UnitWriter
from cskd_pipeline.pipeline.write_cache import WriteOptions as WriteOptions
from cskd_pipeline.pipeline.write_cache import write_cache as write_cache
from cskd_pipeline.views.policy import ViewPolicy as ViewPolicy
from cskd_pipeline.views.policy import register_policy as register_policy

PUBLIC: dict[str, str]
__version__: str
__all__ = [
    "Cache",
    "CacheSection",
    "CachedBatch",
    "CachedLoader",
    "CskdError",
    "DistillationLoss",
    "Encoding",
    "Heads",
    "Loading",
    "LogitTargets",
    "LossParts",
    "Targets",
    "TeacherInfo",
    "TeacherViews",
    "TrainingViews",
    "UnitWriter",
    "ViewPolicy",
    "WriteOptions",
    "__version__",
    "ckf_ratio",
    "dense_logits",
    "inference_logits",
    "open_cache",
    "open_views",
    "register_encoding",
    "register_policy",
    "replay_view",
    "write_cache",
]
