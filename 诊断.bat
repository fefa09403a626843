@echo off
rem Checks this computer and says what is wrong and what to do. Needs no packages: any Python from 3.10 on will do.
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0server" || goto alone
cd ..
set "PYTHONUTF8=1"
set "PYTHONNOUSERSITE=1"
set "CHATGLM_COMMAND=system\launch.bat"
set "VERSION="
set "PYTHON=%~dp0system\python\python.exe"
if exist "%PYTHON%" goto check
set "PYTHON=%~dp0.venv\Scripts\python.exe"
if exist "%PYTHON%" goto check
set "VERSION=-3"
set "PYTHON="
for %%P in (py.exe) do set "PYTHON=%%~$PATH:P"
if defined PYTHON goto check
echo No Python was found: run setup_offline.bat first.
set "CODE=1"
goto end

:check
rem -E and -s: what PYTHONHOME, PYTHONPATH and the user's own packages say is not for this Python
"%PYTHON%" %VERSION% -E -s -X utf8 -m server doctor %*
set "CODE=%errorlevel%"
if %CODE% geq 0 if %CODE% leq 2 goto end
echo Python itself failed with code %CODE%: unpack the whole bundle again, or run setup_offline.bat.
goto end

:alone
rem cmd has said what is not there, in the user's language
echo Unpack the whole zip into a folder on a local disk and start "%~nx0" there. For the desktop make a shortcut, not a copy.
set "CODE=1"

:end
rem a double-click runs cmd /c with the name of a .bat: keep the window, so that the result can be read
setlocal EnableDelayedExpansion
set "LINE=!cmdcmdline!"
if defined LINE if not "!LINE:.bat=!"=="!LINE!" if not defined CI pause
exit /b %CODE%
