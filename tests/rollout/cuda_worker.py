"""Imported in an engine's worker by ``worker_extension_cls``, before it makes its weight transfer engine."""

from tests.rollout.cuda_stand_in import gpu_of_environment, stand_in

stand_in(setattr, gpu_of_environment())


class Extension:
    """Adds nothing: the import is what counts."""
