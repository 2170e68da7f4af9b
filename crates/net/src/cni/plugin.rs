//! One run of one plugin: a program with its order in the environment and on standard input.

use crate::NetError;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    process::{Pid, Signal, kill_process_group},
};
use serde::Deserialize;
use serde_json::Value;
use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

/// A plugin's answer is a few hundred bytes.
const ANSWER_MAX: u64 = 4 << 20;
/// Of a plugin's last words.
const STDERR_MAX: usize = 2048;

/// The order of one run.
pub(super) struct Call<'a> {
    pub command: &'static str,
    pub network: &'a str,
    pub plugin: String,
    pub sandbox_id: &'a str,
    pub netns: &'a Path,
    pub interface: &'a str,
    pub arguments: &'a str,
    pub timeout: Duration,
}

/// The right to run plugins for one sandbox.
///
/// The lock belongs to the open file that the plugins get as standard error. So it is held as long as
/// any of them or their children lives, even when the server dies meanwhile, and the next server's
/// DEL does not overtake a running ADD.
pub(super) struct Lock {
    pub(super) file: File,
    path: PathBuf,
}

impl Lock {
    /// Waits until earlier plugins are gone, but no longer than this: one that left a child behind for
    /// good must not keep a pod from ending.
    pub async fn take(path: &Path, within: Duration) -> Result<Self, NetError> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(NetError::io("open", path))?;
        let deadline = Instant::now() + within;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    sleep(Duration::from_millis(20)).await;
                }
                Err(Errno::WOULDBLOCK) => {
                    tracing::warn!(file = %path.display(), "a process of an earlier CNI plugin still runs");
                    break;
                }
                Err(error) => return Err(NetError::io("lock", path)(error.into())),
            }
        }
        Ok(Self { file, path: path.to_owned() })
    }

    fn last_words(&self) -> String {
        let text = std::fs::read(&self.path).unwrap_or_default();
        let from = text.len().saturating_sub(STDERR_MAX);
        String::from_utf8_lossy(&text[from..]).trim().to_owned()
    }
}

/// How a plugin says that it failed.
#[derive(Deserialize)]
struct Refusal {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Call<'_> {
    /// Runs the plugin; answers its result, which for DEL is nothing.
    pub async fn run(
        self,
        input: &Value,
        lock: &Lock,
        bin_dirs: &[PathBuf],
    ) -> Result<Value, NetError> {
        let program = find(&self.plugin, bin_dirs)?;
        lock.file.set_len(0).map_err(NetError::io("empty", &lock.path))?;
        let child = self.spawn(&program, lock, bin_dirs).await;
        let mut child =
            child.map_err(|source| NetError::Run { plugin: self.plugin.clone(), source })?;
        let started = Instant::now();
        let answer = timeout(self.timeout, talk(&mut child, input.to_string())).await;
        tracing::debug!(
            plugin = self.plugin,
            command = self.command,
            ms = started.elapsed().as_secs_f64() * 1000.0,
            "CNI plugin"
        );
        match answer {
            Ok(Ok((status, answer))) => self.judge(status, &answer, lock),
            Ok(Err(source)) => {
                end(&mut child).await;
                Err(NetError::Run { plugin: self.plugin, source })
            }
            Err(_) => {
                end(&mut child).await;
                Err(NetError::Timeout {
                    plugin: self.plugin,
                    command: self.command,
                    network: self.network.to_owned(),
                    within: self.timeout,
                })
            }
        }
    }

    async fn spawn(&self, program: &Path, lock: &Lock, bin_dirs: &[PathBuf]) -> io::Result<Child> {
        // A namespace that is gone (a reboot) is said as none, which DEL must take.
        let netns =
            if self.netns.exists() { self.netns.as_os_str().to_owned() } else { OsString::new() };
        let folders = std::env::join_paths(bin_dirs).map_err(io::Error::other)?;
        let mut tries = 0;
        loop {
            let child = Command::new(program)
                .env("CNI_COMMAND", self.command)
                .env("CNI_CONTAINERID", self.sandbox_id)
                .env("CNI_NETNS", &netns)
                .env("CNI_IFNAME", self.interface)
                .env("CNI_ARGS", self.arguments)
                .env("CNI_PATH", &folders)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(lock.file.try_clone()?)
                .process_group(0)
                .kill_on_drop(true)
                .spawn();
            match child {
                // The plugin is just being installed.
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < 10 => {
                    tries += 1;
                    sleep(Duration::from_millis(50)).await;
                }
                other => return other,
            }
        }
    }

    fn judge(self, status: ExitStatus, answer: &[u8], lock: &Lock) -> Result<Value, NetError> {
        let why = if !status.success() {
            why(status, answer, &lock.last_words())
        } else if self.command == "DEL" {
            return Ok(Value::Null);
        } else {
            match serde_json::from_slice(answer) {
                Ok(result @ Value::Object(_)) => return Ok(result),
                Ok(_) => "its answer is not an object".to_owned(),
                Err(error) => format!("its answer is not JSON: {error}"),
            }
        };
        let network = self.network.to_owned();
        Err(NetError::Plugin { plugin: self.plugin, command: self.command, network, why })
    }
}

/// Gives the plugin its input and takes its answer.
async fn talk(child: &mut Child, input: String) -> io::Result<(ExitStatus, Vec<u8>)> {
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            match stdin.write_all(input.as_bytes()).await {
                // One that does not read its input fails or succeeds by its own exit.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                other => other,
            }
        } else {
            Ok(())
        }
    };
    let mut answer = Vec::new();
    let read = async {
        match stdout {
            Some(stdout) => stdout.take(ANSWER_MAX).read_to_end(&mut answer).await,
            None => Ok(0),
        }
    };
    let (written, read, status) = tokio::join!(write, read, child.wait());
    written?;
    read?;
    Ok((status?, answer))
}

/// Kills the plugin with its children.
async fn end(child: &mut Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(group) = pid
        && let Err(error) = kill_process_group(group, Signal::KILL)
        && error != Errno::SRCH
    {
        tracing::warn!(%error, "cannot kill a CNI plugin");
    }
    if let Err(error) = child.wait().await {
        tracing::warn!(%error, "cannot wait for a CNI plugin");
    }
}

/// The plugin's own words, or what is known without them.
fn why(status: ExitStatus, answer: &[u8], stderr: &str) -> String {
    if let Ok(Refusal { code, msg, details }) = serde_json::from_slice(answer) {
        let mut why = if msg.is_empty() { format!("error {code}") } else { msg };
        if !details.is_empty() {
            why = format!("{why}; {details}");
        }
        return why;
    }
    let end = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    };
    if stderr.is_empty() { end } else { format!("{end}: {stderr}") }
}

/// The plugin's program in the first folder that has it.
pub(super) fn find(plugin: &str, bin_dirs: &[PathBuf]) -> Result<PathBuf, NetError> {
    let runs = |path: &PathBuf| {
        path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    bin_dirs.iter().map(|folder| folder.join(plugin)).find(runs).ok_or_else(|| NetError::NoPlugin {
        plugin: plugin.to_owned(),
        folders: bin_dirs.to_owned(),
    })
}
