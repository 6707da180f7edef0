"""OpenVINO's entry point, one for the process.

Every `ov.Core` gives the thread that loads its CPU plugin a stack for signals, and puts the former
one back when it is freed. Two that are freed in the order in which they were made leave a stack
that was freed too: the next Ctrl-C or SIGTERM then ends the process with SIGSEGV, before anything
is cleaned up. So there is one, which lives as long as the process.
"""

from __future__ import annotations

import openvino as ov

CORE = ov.Core()
