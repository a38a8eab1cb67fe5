from cskd_pipeline.cache.reader import Cache as Cache
from cskd_pipeline.cache.reader import open_cache as open_cache
from cskd_pipeline.distill.encodings import register_encoding as register_encoding
from cskd_pipeline.distill.targets import Targets as Targets
from cskd_pipeline.errors import CskdError as CskdError
from cskd_pipeline.views.policy import ViewPolicy as ViewPolicy
from cskd_pipeline.views.policy import register_policy as register_policy

PUBLIC: dict[str, str]
__version__: str
__all__ = [
    "Cache",
    "CskdError",
    "Targets",
    "ViewPolicy",
    "__version__",
    "open_cache",
    "register_encoding",
    "register_policy",
]
