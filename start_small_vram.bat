@echo off
rem int4: from 6 GB of GPU memory
rem No "call": it would expand the arguments twice. launch.bat hands the exit code out.
"%~dp0system\launch.bat" --profile small %*
