"""The specification as code: definitions so slow and plain that they can be read, and checked, beside the papers.

Each is what faster code is compared with, in tests and in benchmarks. Nothing here is packed, batched or cached, and
nothing outside `tests` and `benchmarks` may import it.
"""
