@echo off
rem 16 bit: from 13 GB of GPU memory
rem No "call": it would expand the arguments twice. launch.bat hands the exit code out.
"%~dp0system\launch.bat" --profile large %*
