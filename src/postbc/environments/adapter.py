from typing import Any

ChunkAdapter: Any = None
Success = Any
