@echo off
rem Installs or repairs the Python packages: from system\wheels if they are there, else from the network.
setlocal DisableDelayedExpansion
cd /d "%~dp0"
set "PYTHONUTF8=1"
set "PYTHONNOUSERSITE=1"
set "VERSION="
set "PYTHON=%~dp0system\python\python.exe"
if exist "%PYTHON%" goto install
set "VERSION=-3"
set "PYTHON="
for %%P in (py.exe) do set "PYTHON=%%~$PATH:P"
if defined PYTHON goto install
echo No Python was found: install Python 3.11 for Windows (64 bit) from python.org, then run this again.
set "CODE=1"
goto end

:install
"%PYTHON%" %VERSION% "%~dp0system\install.py" %*
set "CODE=%errorlevel%"

:end
rem a double-click runs cmd /c with the name of a .bat: keep the window, so that the result can be read
setlocal EnableDelayedExpansion
set "LINE=!cmdcmdline!"
if defined LINE if not "!LINE:.bat=!"=="!LINE!" if not defined CI pause
exit /b %CODE%
