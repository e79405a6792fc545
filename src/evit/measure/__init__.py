"""What a model costs."""

from evit.measure.macs import count_macs, count_params, match_macs

__all__ = ["count_macs", "count_params", "match_macs"]
