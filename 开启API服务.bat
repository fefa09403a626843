@echo off
rem Starts the server with what fits into the free GPU memory. Options: add --help
rem No "call": it would expand the arguments twice. launch.bat hands the exit code out.
"%~dp0system\launch.bat" %*
