"""Makes arrays of memory that the library has filled, for frameworks whose arrays cannot be written (JAX)."""


class _Lender:
    """The least that from_dlpack() asks of an array on the CPU."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **options):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0


def adopt(like, capsule):
    """The tensor of the capsule as an array of like's framework."""
    return like.__array_namespace__().from_dlpack(_Lender(capsule))
