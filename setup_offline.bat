@echo off
rem Installs or repairs what the program needs: system\install.py does it. Python itself is fetched here if it is not
rem there, because nothing else could.
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0system" || goto alone
set "PYTHONUTF8=1"
set "PYTHONNOUSERSITE=1"
set "VERSION="
set "PYTHON=%~dp0system\python\python.exe"
if exist "%PYTHON%" goto try
if exist "python\" goto fetch
set "PYTHON="
for %%P in (py.exe) do set "PYTHON=%%~$PATH:P"
if not defined PYTHON goto fetch
"%PYTHON%" -3 -E -s -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))" >nul 2>nul
if not "%errorlevel%"=="0" goto fetch
set "VERSION=-3"
goto install

:try
"%PYTHON%" -E -s -c "import ssl, ctypes, zipfile" >nul 2>nul
if "%errorlevel%"=="0" goto install

:fetch
set "PYTHON=%~dp0system\python\python.exe"
set "ARCHIVE=python-3.11.9-embed-amd64.zip"
set "SHA256=009d6bf7e3b2ddca3d784fa09f90fe54336d5b60f0e0f305c37f400bf83cfd3b"
rem full paths: other programs of these names may come first in PATH
set "TOOLS=%SystemRoot%\System32"
set "CODE=1"
if exist "%ARCHIVE%" goto check
echo Fetching Python 3.11.9 from python.org, 11 MB ...
"%TOOLS%\curl.exe" -fL --retry 3 --connect-timeout 20 -o "%ARCHIVE%.part" "https://www.python.org/ftp/python/3.11.9/%ARCHIVE%"
if not "%errorlevel%"=="0" goto byhand
move /y "%ARCHIVE%.part" "%ARCHIVE%" >nul

:check
"%TOOLS%\certutil.exe" -hashfile "%ARCHIVE%" SHA256 | "%TOOLS%\find.exe" "%SHA256%" >nul
if "%errorlevel%"=="0" goto unpack
del "%ARCHIVE%"
goto byhand

:unpack
if not exist "python\" mkdir "python"
"%TOOLS%\tar.exe" -xf "%ARCHIVE%" -C "python"
if not "%errorlevel%"=="0" goto byhand
if exist "%PYTHON%" goto install

:byhand
"%SystemRoot%\System32\chcp.com" 65001 >nul
type "fetch_python.txt"
goto end

:install
cd /d "%~dp0"
"%PYTHON%" %VERSION% -E -s -X utf8 "%~dp0system\install.py" --repair %*
set "CODE=%errorlevel%"
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
