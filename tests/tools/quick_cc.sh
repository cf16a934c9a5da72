#!/bin/sh
# A C compiler that does not optimise, for QKV_CC where what it makes is not looked at.
# SPDX-License-Identifier: Apache-2.0
exec cc "$@" -O0
