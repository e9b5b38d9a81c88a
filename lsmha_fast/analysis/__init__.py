"""Probes, single-head performance (SHP), clusters and signal-to-noise of every head."""

from .bootstrap import SNRIntervals as SNRIntervals
from .bootstrap import bootstrap_snr as bootstrap_snr
from .clusters import Clusters as Clusters
from .clusters import find_clusters as find_clusters
from .null import NullModel as NullModel
from .null import measure_null as measure_null
from .plots import plot_shp as plot_shp
from .probes import BlockProbe as BlockProbe
from .probes import Probes as Probes
from .probes import evaluate_probes as evaluate_probes
from .report import check_folder as check_folder
from .report import write_report as write_report
from .sharding import measure_shards as measure_shards
from .sharding import merge_shards as merge_shards
from .shp import SHP as SHP
from .shp import single_head_performance as single_head_performance
from .snr import SNR as SNR
from .snr import signal_to_noise as signal_to_noise
from .summary import summarize as summarize
from .sweep import Sweep as Sweep
from .sweep import sweep_threshold as sweep_threshold
from .training import train_probes as train_probes
