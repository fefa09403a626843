@echo off
rem 16 bit: from 13 GB of GPU memory
rem No "call": it would expand the arguments twice. launch.bat hands the exit code out.
"%~dp0system\launch.bat" --profile large %*
rem Reached only where that file is not there: cmd has said so, in the user's language
echo Unpack the whole zip into a folder on a local disk and start "%~nx0" there. For the desktop make a shortcut, not a copy.
if not defined CI pause
exit /b 1
