//! Which template a virtual machine of some size is cloned from, and what executes guests here.
//!
//! A template is built by `a3s-box-shim template`, a process of its own with a deadline: in the
//! background for the default size when the server starts, for another size when it is first asked
//! for, and again when kernel, initramfs or QEMU have changed. One is built at a time for each size;
//! whoever needs it waits, and the building goes on when nobody waits any more.
//!
//! With `accel = "auto"`, building the default template under KVM is the trial: only a guest that
//! really started shows that KVM works. The choice holds as long as the server lives.
//!
//! A size whose template cannot be built, or whose clones do not start, is booted instead; another
//! build is tried when what it is made of changes, or after a while.

use crate::{
    config::{AccelChoice, Config, StartMode, VmSettings},
    instruments::Instruments,
    sandbox::{
        SandboxError,
        shim_process::{StartOrder, Templates},
    },
    status::chain,
    vm_size::most_vcpus,
};
use a3s_box_types::shim::{Accel, Start, VmSize};
use a3s_box_vmm::template::{self, Template, TemplateConfig};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Serialize;
use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{io::AsyncReadExt, process::Command, sync::OnceCell};
use tracing::{info, warn};

/// The hardware's door.
pub const KVM: &str = "/dev/kvm";
/// Until a size that could not be built is tried again.
const RETRY: Duration = Duration::from_secs(600);
/// Of what a failed build said.
const WORDS_MAX: usize = 4096;
/// In the templates' folder, a build that is not done.
const UNFINISHED: &str = ".building-";
const RECORD: &str = "template.json";

/// What executes guests here, and why that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Chosen {
    /// KVM or TCG.
    pub accel: Accel,
    /// In words.
    pub why: String,
}

/// The node's templates. Cheap to clone.
#[derive(Clone)]
pub struct GuestTemplates(Arc<Inner>);

struct Inner {
    shim: PathBuf,
    vm: VmSettings,
    folder: PathBuf,
    kvm: PathBuf,
    accel: OnceCell<Chosen>,
    slots: Mutex<HashMap<VmSize, Slot>>,
    instruments: Arc<Instruments>,
}

/// One size; locked while its template is being made.
type Slot = Arc<tokio::sync::Mutex<State>>;

#[derive(Default)]
enum State {
    /// Nobody asked yet.
    #[default]
    Unknown,
    /// Loaded.
    Ready { stamp: Stamp, template: Arc<Template> },
    /// Guests of this size are booted.
    Failed { stamp: Stamp, since: Instant },
}

/// Tells cheaply whether any file a template is made of was changed or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp(Vec<(u64, u64, u64, i64, i64)>);

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
enum TemplateError {
    #[error("{0}")]
    Io(String, #[source] io::Error),
    #[error("a3s-box-shim template failed ({status}): {words}")]
    Build { status: std::process::ExitStatus, words: String },
    #[error("a3s-box-shim template did not end within {0:?}: {1}")]
    Late(Duration, String),
}

impl GuestTemplates {
    /// Under this configuration. Nothing is built yet.
    pub fn new(config: &Config, instruments: Arc<Instruments>) -> Self {
        Self(Arc::new(Inner {
            shim: config.shim.clone(),
            vm: config.vm.clone(),
            folder: config.root.join("templates"),
            kvm: KVM.into(),
            accel: OnceCell::new(),
            slots: Mutex::default(),
            instruments,
        }))
    }

    /// Removes what is of no use any more, finds out what executes guests here, and makes the default
    /// size's template.
    pub async fn prepare(self) {
        let chosen = self.0.accel().await;
        if self.0.vm.start == StartMode::Clone
            && let Err(error) = self.0.template(self.0.vm.default_size, chosen.accel).await
        {
            warn!("no template for the default size: {}", chain(&error));
        }
    }

    /// Starts and freezes a guest of the default size. What executes it, and how long that took.
    pub async fn try_out(&self) -> (Chosen, Result<Duration, String>) {
        let chosen = self.0.accel().await;
        let started = Instant::now();
        let config = self.0.config(self.0.vm.default_size, chosen.accel);
        let built = self.0.build(config, self.0.vm.template_timeout).await;
        (chosen, built.map(|_| started.elapsed()).map_err(|error| chain(&error)))
    }

    /// What executes guests here; `None` while that is being found out.
    pub fn chosen(&self) -> Option<Chosen> {
        self.0.accel.get().cloned()
    }

    /// Why no guest can be started at all; `None` when nothing is known to be missing.
    pub fn missing(&self) -> Option<String> {
        self.0.stamp().err().map(|error| chain(&error))
    }
}

#[tonic::async_trait]
impl Templates for GuestTemplates {
    async fn start_order(&self, size: VmSize) -> Result<StartOrder, SandboxError> {
        const STEP: &str = "find a template for the virtual machine";
        let inner = self.0.clone();
        // A task of its own: a caller that gives up does not stop a build others wait for.
        let order = tokio::spawn(async move { inner.order(size).await }).await;
        let order = order.map_err(|error| SandboxError::step(STEP, error))?;
        order.map_err(|error| SandboxError::step(STEP, error))
    }

    async fn clone_failed(&self, size: VmSize, why: &str) {
        let slot = self.0.slot(size);
        let mut state = slot.lock().await;
        if let State::Ready { stamp, template } = &*state {
            warn!(?size, why, "guests are booted: a clone of the template did not start");
            if let Err(error) = fs::remove_dir_all(template.dir()) {
                warn!(%error, folder = %template.dir().display(), "cannot remove a bad template");
            }
            *state = State::Failed { stamp: stamp.clone(), since: Instant::now() };
        }
    }
}

impl Inner {
    async fn order(self: Arc<Self>, size: VmSize) -> Result<StartOrder, TemplateError> {
        // What cannot be booted either is told in its own words.
        self.stamp()?;
        let accel = self.accel().await.accel;
        let disk_bytes = self.vm.disk_bytes;
        if self.vm.start == StartMode::Clone
            && let Some(template) = self.template(size, accel).await?
        {
            let ram = template.ram().map_err(io("share the template's memory"))?;
            let start = Start::Clone { template: template.dir().to_owned() };
            return Ok(StartOrder { start, accel, ram: Some(ram), disk_bytes });
        }
        let (kernel, initramfs) = (self.vm.kernel.clone(), self.vm.initramfs.clone());
        Ok(StartOrder { start: Start::Boot { kernel, initramfs }, accel, ram: None, disk_bytes })
    }

    async fn accel(&self) -> Chosen {
        let choose = async {
            if let Err(error) = self.remove_old().await {
                warn!("cannot remove old templates: {}", chain(&error));
            }
            let chosen = self.choose().await;
            if self.vm.accel == AccelChoice::Auto && chosen.accel == Accel::Tcg {
                warn!(
                    why = chosen.why,
                    "guests run translated (TCG), several times slower than on KVM"
                );
            } else {
                info!(accel = ?chosen.accel, why = chosen.why, "accelerator");
            }
            chosen
        };
        self.accel.get_or_init(|| choose).await.clone()
    }

    async fn choose(&self) -> Chosen {
        let (accel, why) = match self.vm.accel {
            AccelChoice::Kvm => (Accel::Kvm, "configured".to_owned()),
            AccelChoice::Tcg => (Accel::Tcg, "configured".to_owned()),
            AccelChoice::Auto => match self.try_kvm().await {
                Ok(why) => (Accel::Kvm, why),
                Err(why) => (Accel::Tcg, why),
            },
        };
        Chosen { accel, why }
    }

    async fn try_kvm(&self) -> Result<String, String> {
        let opened = File::options().read(true).write(true).open(&self.kvm);
        opened.map_err(|error| format!("cannot open {}: {error}", self.kvm.display()))?;
        let config = self.config(self.vm.default_size, Accel::Kvm);
        match self.build(config, self.vm.kvm_probe_timeout).await {
            Ok(_) => Ok("a guest started under KVM".to_owned()),
            Err(error) => Err(format!("no guest starts under KVM: {}", chain(&error))),
        }
    }

    /// The size's template; `None` when guests of this size are to be booted.
    async fn template(
        &self,
        size: VmSize,
        accel: Accel,
    ) -> Result<Option<Arc<Template>>, TemplateError> {
        let now = self.stamp()?;
        let slot = self.slot(size);
        let mut state = slot.lock().await;
        match &*state {
            State::Ready { stamp, template } if *stamp == now => return Ok(Some(template.clone())),
            State::Failed { stamp, since } if *stamp == now && since.elapsed() < RETRY => {
                return Ok(None);
            }
            _ => {}
        }
        let started = Instant::now();
        let made = async {
            let folder = self.build(self.config(size, accel), self.vm.template_timeout).await?;
            let path = folder.clone();
            let open = move || Template::open(&path).map_err(io("load the template"));
            let opened = tokio::task::spawn_blocking(open).await.map_err(lost)?;
            if opened.is_err() {
                // Damaged: the next try builds it anew.
                fs::remove_dir_all(&folder).map_err(io("remove a damaged template"))?;
            }
            opened
        };
        let made = made.await;
        self.instruments.template_built(&made, started.elapsed());
        match made {
            Ok(template) => {
                let ms = started.elapsed().as_millis();
                info!(?size, ms, folder = %template.dir().display(), "template ready");
                let template = Arc::new(template);
                *state = State::Ready { stamp: now, template: template.clone() };
                Ok(Some(template))
            }
            Err(error) => {
                warn!(?size, "guests are booted: no template can be made: {}", chain(&error));
                *state = State::Failed { stamp: now, since: Instant::now() };
                Ok(None)
            }
        }
    }

    fn slot(&self, size: VmSize) -> Slot {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).entry(size).or_default().clone()
    }

    fn config(&self, size: VmSize, accel: Accel) -> TemplateConfig {
        TemplateConfig {
            qemu: self.vm.qemu.clone(),
            accel,
            kernel: self.vm.kernel.clone(),
            initramfs: self.vm.initramfs.clone(),
            size,
            most_vcpus: most_vcpus(size, self.vm.max_size.vcpus),
            uid: self.vm.uid_base,
            disk_bytes: self.vm.disk_bytes,
            dir: PathBuf::new(),
        }
    }

    fn stamp(&self) -> Result<Stamp, TemplateError> {
        let files = [
            ("guest kernel", &self.vm.kernel),
            ("guest initramfs", &self.vm.initramfs),
            ("QEMU", &self.vm.qemu),
            ("shim", &self.shim),
        ];
        let stamps = files.into_iter().map(|(what, path)| {
            let data = path.metadata().map_err(io(format!("{what} {}", path.display())))?;
            Ok((data.dev(), data.ino(), data.size(), data.mtime(), data.mtime_nsec()))
        });
        stamps.collect::<Result<_, _>>().map(Stamp)
    }

    /// The folder of the template, built when it is not there.
    async fn build(
        &self,
        config: TemplateConfig,
        within: Duration,
    ) -> Result<PathBuf, TemplateError> {
        let (key, mut config) = keyed(config).await?;
        config.dir = self.folder.join(&key);
        if config.dir.is_dir() {
            return Ok(config.dir);
        }
        fs::create_dir_all(&self.folder).map_err(io(self.folder.display().to_string()))?;
        let order = self.folder.join(format!("{UNFINISHED}{key}.json"));
        let text = serde_json::to_vec_pretty(&config)
            .map_err(|error| TemplateError::Io("write the order".to_owned(), error.into()))?;
        fs::write(&order, text).map_err(io(order.display().to_string()))?;
        let built = run(&self.shim, &order, within).await;
        if let Err(error) = fs::remove_file(&order) {
            warn!(%error, file = %order.display(), "cannot remove a template's order");
        }
        match built {
            // A build that a dead server began may have been faster.
            Err(_) if config.dir.is_dir() => Ok(config.dir),
            Err(error) => Err(error),
            Ok(()) => Ok(config.dir),
        }
    }

    /// Removes templates that today's kernel, initramfs and QEMU would not make, and half-made ones.
    async fn remove_old(&self) -> Result<(), TemplateError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io(self.folder.display().to_string())(error)),
        };
        for entry in entries {
            let entry = entry.map_err(io(self.folder.display().to_string()))?;
            let (path, name) = (entry.path(), entry.file_name());
            if self.is_current(&path, &name.to_string_lossy()).await {
                continue;
            }
            info!(path = %path.display(), "removing an old template");
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(io(format!("remove {}", path.display())))?;
        }
        Ok(())
    }

    async fn is_current(&self, folder: &Path, name: &str) -> bool {
        let Ok(record) = fs::read(folder.join(RECORD)) else { return false };
        let Ok(made) = serde_json::from_slice::<TemplateConfig>(&record) else { return false };
        let today = keyed(self.config(made.size, made.accel)).await;
        today.is_ok_and(|(key, _)| key == name)
    }
}

/// The template's key, which takes reading the kernel and the initramfs.
async fn keyed(config: TemplateConfig) -> Result<(String, TemplateConfig), TemplateError> {
    let read = move || template::key(&config).map(|key| (key, config));
    let keyed = tokio::task::spawn_blocking(read).await.map_err(lost)?;
    keyed.map_err(io("find the template's key"))
}

/// Runs the builder to its end, or ends it.
async fn run(shim: &Path, order: &Path, within: Duration) -> Result<(), TemplateError> {
    let child = Command::new(shim)
        .arg("template")
        .arg(order)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(io(format!("run {} template", shim.display())))?;
    let mut words = Vec::new();
    let ended = {
        let stderr = child.stderr.take();
        let listen = async {
            if let Some(mut stderr) = stderr {
                stderr.read_to_end(&mut words).await?;
            }
            child.wait().await
        };
        tokio::time::timeout(within, listen).await
    };
    // Its log, and then the one line that is meant for others.
    let said = |words: &[u8]| {
        let from = words.len().saturating_sub(WORDS_MAX);
        let words = String::from_utf8_lossy(&words[from..]);
        let error = words.lines().rev().find_map(|line| line.strip_prefix("error: "));
        error.unwrap_or_else(|| words.trim()).to_owned()
    };
    match ended {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(TemplateError::Build { status, words: said(&words) }),
        Ok(Err(error)) => Err(io("wait for the template's builder")(error)),
        Err(_) => {
            // With its QEMU, which is of its process group and dies with it in any case.
            let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
            if let Some(Err(error)) = group.map(|group| kill_process_group(group, Signal::KILL)) {
                warn!(%error, "cannot kill the template's builder");
            }
            child.wait().await.map_err(io("wait for the template's builder"))?;
            Err(TemplateError::Late(within, said(&words)))
        }
    }
}

fn io(step: impl Into<String>) -> impl FnOnce(io::Error) -> TemplateError {
    let step = step.into();
    move |error| TemplateError::Io(step, error)
}

fn lost(error: tokio::task::JoinError) -> TemplateError {
    TemplateError::Io("a thread ended early".to_owned(), io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::beside::Beside;
    use std::os::unix::fs::PermissionsExt;

    /// A node whose shim is a script: it makes the template's folder, and notes that it did.
    struct Node {
        folder: tempfile::TempDir,
        config: Config,
    }

    /// Finds `dir` in its order and fills it.
    const BUILD: &str = r#"dir=$(sed -n 's/.*"dir": "\(.*\)".*/\1/p' "$2"); mkdir -p "$dir"; cp "$2" "$dir/template.json"; truncate -s 1M "$dir/ram""#;

    impl Node {
        fn new(more: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let beside = Beside::folder(folder.path());
            let mut config = Config::parse(more, &beside).unwrap();
            config.root = folder.path().join("root");
            config.vm.kernel = folder.path().join("vmlinuz");
            config.vm.initramfs = folder.path().join("initramfs");
            config.vm.qemu = folder.path().join("qemu");
            config.vm.template_timeout = Duration::from_secs(20);
            let node = Self { folder, config };
            fs::write(&node.config.vm.kernel, "kernel").unwrap();
            fs::write(&node.config.vm.initramfs, "initramfs").unwrap();
            node.script(&node.config.vm.qemu, "echo QEMU 7");
            node.shim(BUILD);
            node
        }

        fn script(&self, path: &Path, text: &str) {
            fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn shim(&self, text: &str) {
            let note = self.path("builds");
            let line = format!(r#"grep -o '"accel": "...' "$2" >> {}; {text}"#, note.display());
            self.script(&self.config.shim, &line);
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn builds(&self) -> usize {
            fs::read_to_string(self.path("builds")).unwrap_or_default().lines().count()
        }

        fn templates(&self) -> GuestTemplates {
            let mut templates = GuestTemplates::new(&self.config, Arc::default());
            Arc::get_mut(&mut templates.0).unwrap().kvm = self.path("kvm");
            templates
        }
    }

    const SMALL: VmSize = VmSize { vcpus: 1, memory_mb: 256 };

    fn clones(order: &Result<StartOrder, SandboxError>) -> bool {
        matches!(order.as_ref().unwrap().start, Start::Clone { .. })
    }

    #[tokio::test]
    async fn a_template_is_built_once_for_all_who_wait_and_found_again_after_a_restart() {
        let node = Node::new("vm.accel = 'tcg'");
        let templates = node.templates();
        let orders = futures::future::join_all((0..8).map(|_| templates.start_order(SMALL))).await;
        assert!(orders.iter().all(clones));
        assert_eq!(node.builds(), 1);
        assert!(clones(&node.templates().start_order(SMALL).await));
        assert_eq!(node.builds(), 1);
    }

    #[tokio::test]
    async fn a_build_goes_on_when_who_asked_for_it_gives_up() {
        let node = Node::new("vm.accel = 'tcg'");
        let go = node.path("go");
        node.shim(&format!("until [ -f {} ]; do sleep 0.01; done; {BUILD}", go.display()));
        let templates = node.templates();
        let asked = templates.start_order(SMALL);
        assert!(tokio::time::timeout(Duration::from_millis(100), asked).await.is_err());
        fs::write(go, "").unwrap();
        assert!(clones(&templates.start_order(SMALL).await));
        assert_eq!(node.builds(), 1);
    }

    #[tokio::test]
    async fn a_new_initramfs_makes_a_new_template_and_the_old_one_goes_at_the_next_start() {
        let node = Node::new("vm.accel = 'tcg'");
        let templates = node.templates();
        templates.start_order(SMALL).await.unwrap();
        fs::write(&node.config.vm.initramfs, "another initramfs").unwrap();
        assert!(clones(&templates.start_order(SMALL).await));
        assert_eq!(node.builds(), 2);
        let folder = node.config.root.join("templates");
        fs::create_dir(folder.join(".building-x")).unwrap();
        let kept = || fs::read_dir(&folder).unwrap().count();
        assert_eq!(kept(), 3);
        node.templates().prepare().await;
        // The one of this size, and the default size's.
        assert_eq!(kept(), 2);
    }

    #[tokio::test]
    async fn guests_are_booted_when_no_template_can_be_made() {
        let node = Node::new("vm.accel = 'tcg'");
        node.shim("echo no room >&2; exit 1");
        let templates = node.templates();
        for _ in 0..2 {
            let order = templates.start_order(SMALL).await.unwrap();
            assert!(matches!(order.start, Start::Boot { .. }) && order.ram.is_none());
        }
        assert_eq!(node.builds(), 1);
    }

    #[tokio::test]
    async fn guests_are_booted_after_a_clone_did_not_start_until_what_it_is_made_of_changes() {
        let node = Node::new("vm.accel = 'tcg'");
        let templates = node.templates();
        assert!(clones(&templates.start_order(SMALL).await));
        templates.clone_failed(SMALL, "bad state").await;
        assert!(!clones(&templates.start_order(SMALL).await));
        node.script(&node.config.vm.qemu, "echo QEMU 70");
        assert!(clones(&templates.start_order(SMALL).await));
    }

    #[tokio::test]
    async fn nothing_is_built_when_guests_are_to_be_booted() {
        let node = Node::new("vm.accel = 'tcg'\nvm.start = 'boot'");
        let templates = node.templates();
        templates.clone().prepare().await;
        assert!(!clones(&templates.start_order(SMALL).await));
        assert_eq!(node.builds(), 0);
    }

    #[tokio::test]
    async fn a_builder_that_hangs_is_killed_with_its_children() {
        let mut node = Node::new("vm.accel = 'tcg'");
        node.config.vm.template_timeout = Duration::from_millis(300);
        let pid = node.path("pid");
        node.shim(&format!("sleep 1000 & echo $! > {}; wait", pid.display()));
        assert!(!clones(&node.templates().start_order(SMALL).await));
        let child = fs::read_to_string(pid).unwrap();
        // The kernel takes its time with a killed process; one that was not killed never ends.
        let runs = || {
            let stat =
                fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while runs() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_missing_kernel_is_told_by_its_path() {
        let node = Node::new("vm.accel = 'tcg'");
        fs::remove_file(&node.config.vm.kernel).unwrap();
        let error = chain(&node.templates().start_order(SMALL).await.unwrap_err());
        assert!(
            error.contains("guest kernel") && error.contains("vmlinuz: No such file"),
            "{error}"
        );
        assert!(node.templates().missing().is_some());
    }

    #[tokio::test]
    async fn kvm_is_chosen_when_a_guest_starts_under_it_and_not_otherwise() {
        let kvm = |node: &Node| fs::write(node.path("kvm"), "").unwrap();
        let absent = Node::new("");
        let order = absent.templates().start_order(SMALL).await.unwrap();
        assert_eq!(order.accel, Accel::Tcg);

        let works = Node::new("");
        kvm(&works);
        let templates = works.templates();
        assert_eq!(templates.start_order(SMALL).await.unwrap().accel, Accel::Kvm);
        assert_eq!(templates.chosen().unwrap().accel, Accel::Kvm);

        let broken = Node::new("");
        kvm(&broken);
        let refuse = "echo log >&2; echo error: no VMX >&2; exit 1";
        broken.shim(&format!(r#"if grep -q '"kvm"' "$2"; then {refuse}; fi; {BUILD}"#));
        let templates = broken.templates();
        let order = templates.start_order(SMALL).await;
        assert!(clones(&order));
        assert_eq!(order.unwrap().accel, Accel::Tcg);
        let why = templates.chosen().unwrap().why;
        assert!(why.ends_with("(exit status: 1): no VMX"), "{why}");
    }
}
