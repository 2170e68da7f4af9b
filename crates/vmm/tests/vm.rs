//! Real QEMU guests: booted, frozen, cloned, killed. They need the guest kernel of `make build`.
#![allow(clippy::unwrap_used)]

use a3s_box_types::shim::{Accel, Start, VmConfig, VmSize};
use a3s_box_vmm::{
    MoreMemory, Stage, Vm, VmParts, VmStreams, disk,
    template::{self, Template, TemplateConfig},
    wait_hello,
};
use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

const DEADLINE: Duration = Duration::from_secs(60);
const UID: u32 = 64_123;
const DISK: u64 = 1 << 30;

/// Kernel and an initramfs whose init is `tests/guest/init.c`, made once per test run.
struct Guest {
    dir: PathBuf,
}

impl Guest {
    fn get() -> &'static Self {
        static GUEST: OnceLock<Guest> = OnceLock::new();
        GUEST.get_or_init(Self::make)
    }

    fn make() -> Self {
        // It is never dropped, so its place is not among what goes with a test.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
        fs::create_dir_all(&dir).unwrap();
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let init = dir.join("init");
        run(Command::new("gcc")
            .args(["-static", "-O2", "-w", "-o"])
            .arg(&init)
            .arg(here.join("tests/guest/init.c")));
        run(Command::new(here.join("../../guest/build.sh"))
            .arg(&dir)
            .arg(&init)
            .env("GUEST_CACHE", here.join("../../target/guest/cache")));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tap in a network namespace that only its descriptor keeps alive.
fn tap() -> OwnedFd {
    std::thread::spawn(|| {
        a3s_box_sys::namespace::unshare_network().unwrap();
        a3s_box_sys::tap::create("tap0").unwrap()
    })
    .join()
    .unwrap()
}

fn vm_config(start: Start) -> VmConfig {
    VmConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        start,
        size: VmSize { vcpus: 1, memory_mb: 256 },
        most_vcpus: 2,
        uid: UID,
    }
}

fn boot_config() -> VmConfig {
    let guest = Guest::get();
    vm_config(Start::Boot { kernel: guest.path("vmlinuz"), initramfs: guest.path("initramfs") })
}

async fn built_template(dir: &Path) -> Template {
    let guest = Guest::get();
    let config = TemplateConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        kernel: guest.path("vmlinuz"),
        initramfs: guest.path("initramfs"),
        size: VmSize { vcpus: 1, memory_mb: 256 },
        most_vcpus: 2,
        uid: UID,
        disk_bytes: DISK,
        dir: dir.join("template"),
    };
    template::build(&config, tap(), |_volumes| async { Ok(b"init".to_vec()) }).await.unwrap();
    Template::open(&config.dir).unwrap()
}

async fn start(
    config: VmConfig,
    disk: fs::File,
    ram: Option<OwnedFd>,
    dir: &Path,
) -> (Vm, UnixStream) {
    let parts = VmParts {
        config,
        disk,
        tap: tap(),
        template_ram: ram,
        console_file: dir.join("console.log"),
    };
    let (vm, VmStreams { agent, .. }) = Vm::start(parts).await.unwrap();
    (vm, UnixStream::from_std(agent).unwrap())
}

async fn clone_of(template: &Template, dir: &Path, name: &str) -> (Vm, UnixStream) {
    let disk = fs::File::open(template.dir().join(template::DISK_FILE)).unwrap();
    let disk = disk::copy_sparse(&disk, &dir.join(name)).unwrap();
    let start_as = Start::Clone { template: template.dir().to_owned() };
    let (vm, mut agent) =
        start(vm_config(start_as), disk, Some(template.ram().unwrap()), dir).await;
    wait_hello(&mut agent, DEADLINE).await.unwrap();
    (vm, agent)
}

async fn ask(agent: &mut UnixStream, request: u8, answer: &mut [u8]) {
    agent.write_all(&[request]).await.unwrap();
    agent.read_exact(answer).await.unwrap();
}

#[tokio::test]
async fn a_booted_guest_says_hello_and_sees_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk::format(&dir.path().join("disk"), DISK).unwrap();
    let (mut vm, mut agent) = start(boot_config(), disk, None, dir.path()).await;
    wait_hello(&mut agent, DEADLINE).await.unwrap();
    let mut size = [0; 8];
    ask(&mut agent, b'd', &mut size).await;
    assert_eq!(u64::from_le_bytes(size), DISK);
    vm.kill().await;
    assert!(dir.path().join("console.log").exists());
}

#[tokio::test]
async fn clones_of_one_template_live_side_by_side_and_draw_different_random_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let template = built_template(dir.path()).await;
    let before = digest(&template);
    let (mut first, mut first_agent) = clone_of(&template, dir.path(), "a").await;
    let (mut second, mut second_agent) = clone_of(&template, dir.path(), "b").await;
    let (mut a, mut b) = ([0; 16], [0; 16]);
    ask(&mut first_agent, b'r', &mut a).await;
    ask(&mut second_agent, b'r', &mut b).await;
    assert_ne!(a, b, "two clones share their random numbers");
    first.kill().await;
    ask(&mut second_agent, b'x', &mut a[..1]).await;
    assert_eq!(a[0], b'x', "one clone's end touched another");
    second.kill().await;
    assert_eq!(digest(&template), before, "a clone wrote into its template");
}

#[tokio::test]
async fn a_clone_is_given_memory_and_gives_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let template = built_template(dir.path()).await;
    let before = digest(&template);
    let (mut vm, mut agent) = clone_of(&template, dir.path(), "a").await;
    let hardware = vm.hardware(1024);
    assert_eq!(hardware.more_memory().await.unwrap(), MoreMemory::default());
    assert_eq!(hardware.ask_for_memory(0).await.unwrap(), MoreMemory::default());
    let start = memory(&mut agent).await;
    // Not a multiple of what the guest takes at once.
    for (asked, has) in [(511, 512), (1024, 1024), (256, 256), (0, 0)] {
        hardware.ask_for_memory(asked).await.unwrap();
        while hardware.more_memory().await.unwrap().there_mb != has {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The guest puts it to use after it has taken it.
        while memory(&mut agent).await.abs_diff(start + (u64::from(has) << 20)) > 1 << 20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let error = hardware.ask_for_memory(2048).await.unwrap_err().to_string();
    assert!(error.contains("the 1024 MiB to add"), "{error}");
    assert_eq!(hardware.more_memory().await.unwrap(), MoreMemory::default());
    vm.kill().await;
    assert_eq!(digest(&template), before, "a clone's new memory is its template's");
}

async fn memory(agent: &mut UnixStream) -> u64 {
    let mut size = [0; 8];
    ask(agent, b'm', &mut size).await;
    u64::from_le_bytes(size)
}

#[tokio::test]
async fn a_guest_that_cannot_start_is_an_error_with_its_last_words() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("initramfs");
    fs::write(&empty, []).unwrap();
    let kernel = Guest::get().path("vmlinuz");
    let config = TemplateConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        kernel,
        initramfs: empty,
        size: VmSize { vcpus: 1, memory_mb: 256 },
        most_vcpus: 2,
        uid: UID,
        disk_bytes: DISK,
        dir: dir.path().join("template"),
    };
    let err = template::build(&config, tap(), |_volumes| std::future::pending()).await.unwrap_err();
    assert_eq!(err.stage, Stage::Hello);
    assert!(err.to_string().contains("panic"), "{err}");
    assert!(!config.dir.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a half-built template was left");
}

#[tokio::test]
async fn qemu_does_not_run_as_root() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk::format(&dir.path().join("disk"), DISK).unwrap();
    let parts = VmParts {
        config: VmConfig { uid: 0, ..boot_config() },
        disk,
        tap: tap(),
        template_ram: None,
        console_file: dir.path().join("console.log"),
    };
    assert_eq!(Vm::start(parts).await.unwrap_err().stage, Stage::Prepare);
}

#[tokio::test]
async fn what_qemu_complains_about_is_in_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk::format(&dir.path().join("disk"), DISK).unwrap();
    let size = VmSize { vcpus: 5000, memory_mb: 256 };
    let parts = VmParts {
        config: VmConfig { size, ..boot_config() },
        disk,
        tap: tap(),
        template_ram: None,
        console_file: dir.path().join("console.log"),
    };
    let err = Vm::start(parts).await.unwrap_err();
    assert!(err.to_string().contains("5000"), "{err}");
}

#[tokio::test]
async fn a_killed_machine_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk::format(&dir.path().join("disk"), DISK).unwrap();
    let (mut vm, _agent) = start(boot_config(), disk, None, dir.path()).await;
    let pid = vm.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{UID}")), "{status}");
    vm.kill().await;
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(vm.wait().await.reason.contains("signal 9"));
}

fn digest(template: &Template) -> Vec<u8> {
    let ram = template.ram().unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&ram));
    let ram = fs::File::open(path).unwrap();
    Command::new("sha256sum").stdin(ram).output().unwrap().stdout
}
