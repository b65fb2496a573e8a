"""Ranks that torchrun starts, without the launcher: they serve until SIGTERM, and tell Prometheus about it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from runtime_models import save_checkpoint

from weightwire.engines.native.options import ReplicaOptions
