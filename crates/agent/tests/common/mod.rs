//! The real agent as a child process on a socket pair, with images and a client. Needs root.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use a3s_box_api::agent::v1::{
    self as api, agent_client::AgentClient, event, exec_input, exec_output, io_output,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::{
    fs,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};

pub const DEADLINE: Duration = Duration::from_secs(20);

/// A running agent. Dropping it ends the agent and checks that it left nothing.
pub struct Sandbox {
    pub calls: Calls,
    pub dir: tempfile::TempDir,
    pub cgroups: PathBuf,
    agent: Child,
}

fn cgroup_root() -> PathBuf {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists())
        .unwrap()
}

pub fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A root with busybox, users and groups; `change` may alter it before it becomes a layer.
pub fn make_layer(blob: &Path, change: impl FnOnce(&Path)) {
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    change(dir.path());
    run(Command::new("mkfs.erofs").arg("-Enoinline_data").arg(blob).arg(dir.path()));
}

/// What most tests run in.
pub fn base(root: &Path) {
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/user"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "sleep", "id", "true", "false", "ls", "touch", "mkdir", "tty", "stty",
        "grep", "hostname", "kill", "head", "dd", "ps", "readlink", "mount", "mknod", "test",
        "stat", "env", "pwd", "seq", "wc", "ip", "ulimit", "yes", "printenv", "cp", "rm", "trap",
        "date", "dmesg", "tail", "setsid", "tr",
    ] {
        fs::hard_link(root.join("bin/busybox"), root.join("bin").join(applet)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n").unwrap();
    fs::write(root.join("etc/plain"), "no program").unwrap();
    fs::write(root.join("bin/garbage"), "\u{7f}garbage").unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(root.join("bin/garbage"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    // A link whose target is missing, as systemd's images have it.
    std::os::unix::fs::symlink("/run/resolve/stub.conf", root.join("etc/resolv.conf")).unwrap();
}

pub fn id(number: u32) -> String {
    format!("{number:064x}")
}

/// A client over one connected stream.
pub async fn connect(stream: tokio::net::UnixStream) -> AgentClient<Channel> {
    let mut stream = Some(stream);
    let channel = Endpoint::from_static("http://agent")
        .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
            let stream = stream.take().map(TokioIo::new);
            async move { stream.ok_or_else(|| std::io::Error::other("there is one connection")) }
        }))
        .await
        .unwrap();
    AgentClient::new(channel)
}

impl Sandbox {
    /// An agent that is not configured yet.
    pub async fn unconfigured() -> Self {
        Self::with(&["--own", "ipc", "--own", "uts"]).await
    }

    /// The same with other arguments than namespaces of its own.
    pub async fn with(args: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::tempdir().unwrap();
        let cgroups = cgroup_root().join(format!("a3s-agent-test-{}-{number}", std::process::id()));
        fs::create_dir(&cgroups).unwrap();
        make_layer(&dir.path().join("share/images/base"), base);
        fs::create_dir_all(dir.path().join("scratch")).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let agent = Command::new(env!("CARGO_BIN_EXE_a3s-box-agent"))
            .arg("--socket")
            .arg(theirs.as_raw_fd().to_string())
            .arg("--share")
            .arg(dir.path().join("share"))
            .arg("--scratch")
            .arg(dir.path().join("scratch"))
            .arg("--runtime")
            .arg(dir.path().join("run"))
            .arg("--cgroups")
            .arg(&cgroups)
            .args(args)
            .spawn()
            .unwrap();
        drop(theirs);
        ours.set_nonblocking(true).unwrap();
        let client = connect(tokio::net::UnixStream::from_std(ours).unwrap()).await;
        Self { calls: Calls(client), dir, cgroups, agent }
    }

    /// An agent whose sandbox is configured.
    pub async fn start() -> Self {
        Self::unconfigured().await.configured().await
    }

    /// The sandbox, configured.
    pub async fn configured(self) -> Self {
        let mut sandbox = self;
        let request = api::ConfigureSandboxRequest {
            hostname: "pod".into(),
            dns: Some(api::Dns { servers: vec!["10.9.8.7".into()], ..api::Dns::default() }),
            shared_pid_namespace: true,
            ..api::ConfigureSandboxRequest::default()
        };
        sandbox.calls.0.configure_sandbox(request).await.unwrap();
        sandbox
    }

    /// Folder of a volume named `name`, given as a bind mount's source.
    pub fn volume(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("share/volumes").join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Hangs up and returns once the agent has ended; panics when it left something.
    pub async fn end(mut self) {
        self.calls =
            Calls(AgentClient::new(Endpoint::from_static("http://nowhere").connect_lazy()));
        let deadline = std::time::Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.agent.try_wait().unwrap() {
                break status;
            }
            assert!(std::time::Instant::now() < deadline, "the agent does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(status.success(), "{status}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.dir.path().to_str().unwrap();
        assert!(!mounts.contains(here), "mounts are left: {mounts}");
        assert_eq!(fs::read_dir(self.dir.path().join("scratch")).unwrap().count(), 0);
        fs::remove_dir(&self.cgroups).unwrap();
    }
}

impl std::ops::Deref for Sandbox {
    type Target = Calls;

    fn deref(&self) -> &Calls {
        &self.calls
    }
}

impl std::ops::DerefMut for Sandbox {
    fn deref_mut(&mut self) -> &mut Calls {
        &mut self.calls
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // After a failed test: leave no process, whatever else is left.
        fs::write(self.cgroups.join("cgroup.kill"), "1").ok();
        self.agent.kill().ok();
        self.agent.wait().ok();
        run(Command::new("sh").arg("-c").arg(format!(
            "for m in $(grep -o ' {0}[^ ]*' /proc/self/mountinfo); do umount -l $m; done; find {1} -depth -type d -exec rmdir {{}} + 2>/dev/null; true",
            self.dir.path().display(),
            self.cgroups.display()
        )));
    }
}

/// A container to create: its spec and request, open to change.
pub struct Wanted {
    pub spec: Value,
    pub request: api::CreateContainerRequest,
}

/// Runs `command` in a shell.
pub fn shell(number: u32, command: &str) -> Wanted {
    program(number, &["sh", "-c", command])
}

const CAPS: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

pub fn program(number: u32, args: &[&str]) -> Wanted {
    Wanted {
        spec: json!({
            "ociVersion": "1.2.0",
            "root": { "path": "rootfs" },
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "cwd": "/",
                "args": args,
                "env": ["PATH=/usr/bin:/bin"],
                "capabilities": { "bounding": CAPS, "effective": CAPS, "permitted": CAPS },
            },
            "linux": {
                "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "cgroup" }],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/not-there"],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            },
        }),
        request: api::CreateContainerRequest {
            container_id: id(number),
            layers: vec!["images/base".into()],
            ..api::CreateContainerRequest::default()
        },
    }
}

impl Wanted {
    /// Sets a field of the spec, by JSON pointer; the parent must be there.
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        self.spec.pointer_mut(parent).unwrap()[field] = value;
        self
    }

    pub fn user(mut self, user: api::User) -> Self {
        self.request.user = Some(user);
        self
    }

    pub fn pid(mut self, mode: api::PidMode, target: u32) -> Self {
        self.request.set_pid_mode(mode);
        self.request.pid_target = id(target);
        self
    }

    pub fn layers(mut self, layers: &[&str]) -> Self {
        self.request.layers = layers.iter().map(|&layer| layer.into()).collect();
        self
    }

    pub fn bind(self, source: &Path, destination: &str, options: &[&str]) -> Self {
        let mount = json!({ "destination": destination, "type": "bind", "source": source, "options": options });
        let mut mounts = self.spec["mounts"].as_array().cloned().unwrap_or_default();
        mounts.push(mount);
        self.with("/mounts", Value::Array(mounts))
    }
}

/// What a process said and how it ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Said {
    pub stdout: String,
    pub stderr: String,
    pub exit: api::Exit,
}

/// The calls, with a deadline.
#[derive(Clone)]
pub struct Calls(pub AgentClient<Channel>);

pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("deadline")
}

impl Calls {
    pub async fn create(
        &mut self,
        wanted: Wanted,
    ) -> Result<api::CreateContainerResponse, tonic::Status> {
        let mut request = wanted.request;
        request.oci_spec = wanted.spec.to_string().into();
        within(self.0.create_container(request)).await.map(tonic::Response::into_inner)
    }

    pub async fn start(
        &mut self,
        number: u32,
    ) -> Result<api::StartContainerResponse, tonic::Status> {
        let request = api::StartContainerRequest { container_id: id(number) };
        within(self.0.start_container(request)).await.map(tonic::Response::into_inner)
    }

    pub async fn remove(&mut self, number: u32) -> Result<(), tonic::Status> {
        let request = api::RemoveContainerRequest { container_id: id(number) };
        within(self.0.remove_container(request)).await.map(drop)
    }

    pub async fn signal(
        &mut self,
        number: u32,
        signal: u32,
        all: bool,
    ) -> Result<(), tonic::Status> {
        let request = api::SignalContainerRequest { container_id: id(number), signal, all };
        within(self.0.signal_container(request)).await.map(drop)
    }

    /// The streams of init: what is sent goes to it, after the first message.
    pub async fn io(
        &mut self,
        number: u32,
    ) -> (mpsc::Sender<api::IoInput>, Streaming<api::IoOutput>) {
        let (sender, receiver) = mpsc::channel(16);
        sender
            .send(api::IoInput { container_id: id(number), ..api::IoInput::default() })
            .await
            .unwrap();
        let outputs =
            within(self.0.container_io(ReceiverStream::new(receiver))).await.unwrap().into_inner();
        (sender, outputs)
    }

    /// Creates, starts and follows a container to its end.
    pub async fn run(&mut self, wanted: Wanted) -> Said {
        let container_id = wanted.request.container_id.clone();
        let number = u32::from_str_radix(&container_id, 16).unwrap();
        self.create(wanted).await.unwrap();
        let (input, mut outputs) = self.io(number).await;
        drop(input);
        self.start(number).await.unwrap();
        let mut said = read_io(&mut outputs).await;
        said.exit = self.exit_of(number).await;
        said
    }

    /// Waits for the exit event.
    pub async fn exit_of(&mut self, number: u32) -> api::Exit {
        let mut events = within(self.0.events(api::EventsRequest {})).await.unwrap().into_inner();
        loop {
            let event = within(events.message()).await.unwrap().unwrap();
            if let Some(event::Kind::ContainerExited(exited)) = event.kind
                && exited.container_id == id(number)
            {
                return exited.exit.unwrap();
            }
        }
    }

    /// Starts an exec.
    pub async fn exec_stream(
        &mut self,
        start: api::ExecStart,
    ) -> Result<(mpsc::Sender<api::ExecInput>, Streaming<api::ExecOutput>), tonic::Status> {
        let (sender, receiver) = mpsc::channel(16);
        sender.send(api::ExecInput { kind: Some(exec_input::Kind::Start(start)) }).await.unwrap();
        let outputs = within(self.0.exec(ReceiverStream::new(receiver))).await?.into_inner();
        Ok((sender, outputs))
    }

    /// Runs an exec to its end.
    pub async fn exec(&mut self, number: u32, args: &[&str]) -> Result<Said, tonic::Status> {
        let (_input, mut outputs) = self.exec_stream(exec_start(number, args)).await?;
        read_exec(&mut outputs).await
    }
}

pub fn exec_start(number: u32, args: &[&str]) -> api::ExecStart {
    api::ExecStart {
        container_id: id(number),
        args: args.iter().map(|&arg| arg.into()).collect(),
        ..api::ExecStart::default()
    }
}

pub async fn read_io(outputs: &mut Streaming<api::IoOutput>) -> Said {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(message) = within(outputs.message()).await.unwrap() {
        match message.kind.unwrap() {
            io_output::Kind::Stdout(bytes) => stdout.extend(bytes),
            io_output::Kind::Stderr(bytes) => stderr.extend(bytes),
        }
    }
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { stdout: text(stdout), stderr: text(stderr), exit: api::Exit::default() }
}

pub async fn read_exec(outputs: &mut Streaming<api::ExecOutput>) -> Result<Said, tonic::Status> {
    let mut said = Said::default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    while let Some(message) = within(outputs.message()).await? {
        match message.kind.unwrap() {
            exec_output::Kind::Started(pid) => assert!(pid > 0),
            exec_output::Kind::Stdout(bytes) => said.stdout += &text(&bytes),
            exec_output::Kind::Stderr(bytes) => said.stderr += &text(&bytes),
            exec_output::Kind::Exit(exit) => said.exit = exit,
        }
    }
    Ok(said)
}

/// Reads init's output until it has `word`.
pub async fn read_io_until(outputs: &mut Streaming<api::IoOutput>, word: &str) -> Said {
    let mut said = Said::default();
    while !said.stdout.contains(word) {
        let message = within(outputs.message()).await.unwrap().expect("the end came first");
        match message.kind.unwrap() {
            io_output::Kind::Stdout(bytes) => said.stdout += &String::from_utf8_lossy(&bytes),
            io_output::Kind::Stderr(bytes) => said.stderr += &String::from_utf8_lossy(&bytes),
        }
    }
    said
}

/// Reads until the output has `word`.
pub async fn read_until(outputs: &mut Streaming<api::ExecOutput>, word: &str) -> String {
    let mut all = String::new();
    while !all.contains(word) {
        let message = within(outputs.message()).await.unwrap().expect("the end came first");
        if let Some(exec_output::Kind::Stdout(bytes)) = message.kind {
            all += &String::from_utf8_lossy(&bytes);
        }
    }
    all
}

pub fn code<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.message().to_owned())
}
