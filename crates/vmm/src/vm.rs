//! One running virtual machine: from its start to its end.

use crate::{
    command::{self, Origin, Wires},
    console::Console,
    error::{Stage, VmmError, at},
    hardware::Hardware,
    madt,
    qmp::Qmp,
};
use a3s_box_sys::{memfd, pidfd, watch::watch};
use a3s_box_types::shim::{Start, VmConfig};
use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    sync::Mutex,
};

/// The first bytes the agent says on its port.
pub const HELLO: &[u8; 8] = b"A3SBOX1\n";

/// What a virtual machine is made of.
#[derive(Debug)]
pub struct VmParts {
    /// Its order.
    pub config: VmConfig,
    /// The scratch disk: a copy of the template's for a clone, a formatted one for a boot.
    pub disk: File,
    /// The card's other end.
    pub tap: OwnedFd,
    /// The template's sealed memory; for a clone only.
    pub template_ram: Option<OwnedFd>,
    /// Where the console's tail is left when the machine ends.
    pub console_file: PathBuf,
}

/// The host's ends of the guest's ports, non-blocking.
#[derive(Debug)]
pub struct VmStreams {
    /// The agent's; its hello has not been read.
    pub agent: UnixStream,
    /// The share's.
    pub volumes: UnixStream,
    /// The lanes, in the order of their numbers.
    pub lanes: Vec<UnixStream>,
}

/// How a virtual machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExit {
    /// In words: `QEMU exited with code 1`.
    pub reason: String,
    /// Somebody killed QEMU, or it crashed; otherwise it ended by itself.
    pub by_signal: bool,
}

/// A virtual machine. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    process: AsyncFd<OwnedFd>,
    console: Console,
    console_reader: Option<tokio::task::JoinHandle<()>>,
    console_file: PathBuf,
    /// Shared with whoever changes the machine while it runs.
    pub(crate) qmp: Arc<Mutex<Qmp>>,
    exit: Option<VmExit>,
}

impl Vm {
    /// Starts the machine as its order says and lets it run. The guest may still be booting.
    ///
    /// # Errors
    /// The stage that failed, with the console's tail. Nothing is left running.
    pub async fn start(parts: VmParts) -> Result<(Self, VmStreams), VmmError> {
        let origin = match &parts.config.start {
            Start::Boot { kernel, initramfs } => {
                Origin::Boot(boot(&parts.config, kernel, initramfs)?)
            }
            Start::Clone { template } => Origin::Clone {
                ram: parts.template_ram.ok_or_else(|| {
                    VmmError::new(Stage::Prepare, "a clone needs its template's memory")
                })?,
                state: open(&template.join(crate::template::STATE_FILE))?.into(),
            },
        };
        let is_clone = matches!(parts.config.start, Start::Clone { .. });
        let (vm, streams) =
            Self::spawn(&parts.config, origin, parts.disk, parts.tap, parts.console_file).await?;
        if is_clone && let Err(err) = vm.load().await {
            return Err(vm.failed(Stage::Load, err).await);
        }
        Ok((vm, streams))
    }

    /// Starts QEMU and its control session; a clone is then still empty.
    pub(crate) async fn spawn(
        config: &VmConfig,
        origin: Origin,
        disk: File,
        tap: OwnedFd,
        console_file: PathBuf,
    ) -> Result<(Self, VmStreams), VmmError> {
        if config.uid == 0 {
            return Err(VmmError::new(
                Stage::Prepare,
                "QEMU does not run as root: choose another uid",
            ));
        }
        let (qmp, qmp_far) = UnixStream::pair().map_err(at(Stage::Prepare))?;
        let (agent, agent_far) = UnixStream::pair().map_err(at(Stage::Prepare))?;
        let (volumes, volumes_far) = UnixStream::pair().map_err(at(Stage::Prepare))?;
        let lanes = (0..a3s_box_lane::COUNT).map(|_| UnixStream::pair());
        let lanes: Vec<_> = lanes.collect::<Result<_, _>>().map_err(at(Stage::Prepare))?;
        let (lanes, lanes_far): (Vec<_>, Vec<_>) = lanes.into_iter().unzip();
        let (console_near, console_far) = UnixStream::pair().map_err(at(Stage::Prepare))?;
        let wires = Wires {
            qmp: qmp_far.into(),
            agent: agent_far.into(),
            volumes: volumes_far.into(),
            lanes: lanes_far.into_iter().map(OwnedFd::from).collect(),
            // QEMU's own complaints go where the guest's do.
            console: console_far.try_clone().map_err(at(Stage::Prepare))?.into(),
            tap,
            disk: disk.into(),
        };
        let mut qemu = command::qemu(config, wires, origin);
        qemu.output = Some(console_far.into());
        for stream in [&agent, &volumes].into_iter().chain(&lanes) {
            stream.set_nonblocking(true).map_err(at(Stage::Prepare))?;
        }
        let (console, reader) = Console::follow(console_near).map_err(at(Stage::Prepare))?;
        let child = Guard(Some(qemu.start().map_err(at(Stage::Spawn))?));
        let process = child.process().map_err(at(Stage::Spawn))?;
        let qmp = match Qmp::connect(qmp).await {
            Ok(qmp) => qmp,
            Err(err) => {
                drop(child);
                // QEMU has ended, so its output has too: what it complained about is all there.
                let _ended = tokio::time::timeout(Duration::from_secs(1), reader).await;
                return Err(VmmError::new(Stage::Control, err).with_console(console.tail()));
            }
        };
        let vm = Self {
            child: child.release(),
            process,
            console,
            console_reader: Some(reader),
            console_file,
            qmp: Arc::new(Mutex::new(qmp)),
            exit: None,
        };
        Ok((vm, VmStreams { agent, volumes, lanes }))
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last 64 KiB the guest and QEMU printed.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }

    /// A handle on the console that outlives the borrow.
    pub fn console(&self) -> Console {
        self.console.clone()
    }

    /// A handle that changes the machine while it runs; it outlives the borrow. `room_mb`: how much
    /// memory may ever be added.
    pub fn hardware(&self, room_mb: u32) -> Hardware {
        Hardware::new(self.qmp.clone(), room_mb)
    }

    /// Waits for the machine's end; saves the console's tail. Cancel safe.
    pub async fn wait(&mut self) -> VmExit {
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        let lost = |reason| VmExit { reason, by_signal: false };
        let exit = match self.process.readable().await {
            Ok(_) => match self.child.wait() {
                Ok(status) => {
                    VmExit { reason: describe(status), by_signal: status.signal().is_some() }
                }
                Err(err) => lost(format!("QEMU could not be waited for: {err}")),
            },
            Err(err) => lost(format!("QEMU could not be watched: {err}")),
        };
        self.exit = Some(exit.clone());
        if let Some(reader) = self.console_reader.take() {
            let _ended = tokio::time::timeout(Duration::from_secs(1), reader).await;
        }
        if let Err(err) = std::fs::write(&self.console_file, self.console.tail()) {
            tracing::warn!(file = %self.console_file.display(), %err, "cannot keep the console's tail");
        }
        exit
    }

    /// Ends the machine and waits until it is gone.
    pub async fn kill(&mut self) {
        if self.exit.is_none()
            && let Err(err) = pidfd::kill(self.process.get_ref())
        {
            tracing::warn!(pid = self.pid(), %err, "cannot kill QEMU");
        }
        self.wait().await;
    }

    /// Kills the machine because `stage` failed, and says what the guest said.
    pub(crate) async fn failed(
        mut self,
        stage: Stage,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> VmmError {
        self.kill().await;
        VmmError::new(stage, source).with_console(self.console.tail())
    }

    /// Fills a clone with its template's state and lets it run.
    async fn load(&self) -> io::Result<()> {
        let mut qmp = self.qmp.lock().await;
        skip_shared_memory(&mut qmp).await?;
        qmp.execute("migrate-incoming", serde_json::json!({ "uri": command::STATE_URI })).await?;
        qmp.migration_ended().await?;
        qmp.execute("cont", serde_json::json!({})).await?;
        Ok(())
    }
}

/// Tells both sides of a save and load that memory is passed by other means, and asks for events.
pub(crate) async fn skip_shared_memory(qmp: &mut Qmp) -> io::Result<()> {
    let capability = |name| serde_json::json!({ "capability": name, "state": true });
    let both = [capability("x-ignore-shared"), capability("events")];
    qmp.execute("migrate-set-capabilities", serde_json::json!({ "capabilities": both })).await?;
    Ok(())
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.exit.is_none() {
            drop(Guard::kill(&mut self.child));
        }
    }
}

/// A child that is killed and reaped unless it is released.
struct Guard(Option<Child>);

impl Guard {
    fn process(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let child = self.0.as_ref().ok_or(io::ErrorKind::NotFound)?;
        watch(pidfd::of_child(child)?, tokio::io::Interest::READABLE)
    }

    fn release(mut self) -> Child {
        self.0.take().expect("a guard is released once, by value")
    }

    fn kill(child: &mut Child) -> io::Result<ExitStatus> {
        child.kill()?;
        child.wait()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            drop(Self::kill(child));
        }
    }
}

/// Reads the agent's [`HELLO`]; the host says nothing before.
///
/// # Errors
/// Stage `Hello`: other bytes, the guest's end, or `deadline` passed. The caller adds the console.
pub async fn wait_hello(
    agent: &mut tokio::net::UnixStream,
    deadline: Duration,
) -> Result<(), VmmError> {
    let mut bytes = [0; HELLO.len()];
    match tokio::time::timeout(deadline, agent.read_exact(&mut bytes)).await {
        Ok(Ok(_)) if bytes == *HELLO => Ok(()),
        Ok(Ok(_)) => Err(VmmError::new(
            Stage::Hello,
            format!(
                "its first bytes are {:?}, not this version's hello",
                String::from_utf8_lossy(&bytes)
            ),
        )),
        Ok(Err(err)) => Err(VmmError::new(Stage::Hello, err)),
        Err(_) => Err(VmmError::new(
            Stage::Hello,
            format!("nothing came within {} ms", deadline.as_millis()),
        )),
    }
}

/// What a machine of this order boots from.
pub(crate) fn boot(
    config: &VmConfig,
    kernel: &Path,
    initramfs: &Path,
) -> Result<command::Boot, VmmError> {
    let table = || -> io::Result<OwnedFd> {
        let mut table = memfd::create("a3s-box-processors")?;
        // More of them have no number in this kind of table; QEMU refuses so many itself.
        let count = u8::try_from(config.further_vcpus().end).unwrap_or(254);
        table.write_all(&madt::body(count))?;
        Ok(table.into())
    };
    Ok(command::Boot {
        kernel: open(kernel)?.into(),
        initramfs: open(initramfs)?.into(),
        processors: table().map_err(at(Stage::Prepare))?,
    })
}

pub(crate) fn open(path: &Path) -> Result<File, VmmError> {
    File::open(path)
        .map_err(|err| VmmError::new(Stage::Prepare, format!("open {}: {err}", path.display())))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("QEMU exited with code {code}"),
        (None, Some(signal)) => format!("QEMU was ended by signal {signal}"),
        (None, None) => format!("QEMU ended: {status}"),
    }
}
