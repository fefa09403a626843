@echo off
rem The other launchers end here: finds Python, lets install.py check the packages, starts the server.
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0.."
set "PYTHONUTF8=1"
set "PYTHONNOUSERSITE=1"
if not defined CHATGLM_BROWSER set "CHATGLM_BROWSER=1"
set "CHATGLM_COMMAND=system\launch.bat"
set "PYTHON=%~dp0python\python.exe"
if exist "%PYTHON%" goto start
set "PYTHON=%~dp0..\.venv\Scripts\python.exe"
if exist "%PYTHON%" goto start

:missing
"%SystemRoot%\System32\chcp.com" 65001 >nul
type "%~dp0no_python.txt"
set "CODE=1"
goto end

:start
rem -E and -s: what PYTHONHOME, PYTHONPATH and the user's own packages say is not for this Python
"%PYTHON%" -E -s -X utf8 "%~dp0install.py" -- %*
set "CODE=%errorlevel%"
if "%CODE%"=="0" goto serve
rem no word came from a Python that a virus scanner or a broken off copy left incomplete
"%PYTHON%" -E -s -c "" >nul 2>nul
if not "%errorlevel%"=="0" goto missing
goto end

:serve
"%PYTHON%" -E -s -X utf8 -m server %*
set "CODE=%errorlevel%"

:end
rem a double-click runs cmd /c with the name of a .bat: keep the window, so that the error can be read
setlocal EnableDelayedExpansion
set "LINE=!cmdcmdline!"
if not "%CODE%"=="0" if defined LINE if not "!LINE:.bat=!"=="!LINE!" if not defined CI pause
exit /b %CODE%
