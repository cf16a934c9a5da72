"""python -m qkv.bench: qkv beside the other libraries that are installed, on the same inputs in one run.

main(argv) of qkv.bench.__main__ is the program; measure.py verifies and times, report.py writes the
table, the JSON and the plots; the other files hold the problems, one function a family.

SPDX-License-Identifier: Apache-2.0
"""
