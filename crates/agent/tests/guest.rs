//! The agent as PID 1 of real guests, with the share and the disk they have in production. Needs
//! `make build`: kernel, initramfs and the static agent in target/guest.
#![allow(clippy::unwrap_used)]

mod common;

use a3s_box_api::agent::v1 as api;
use a3s_box_types::shim::{Accel, Start, VmConfig, VmSize};
use a3s_box_vmm::{Vm, VmParts, VmStreams, disk, template, wait_hello};
use common::{Calls, base, code, connect, id, make_layer, program, shell, within};
use serde_json::json;
use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tonic::Code;

const DEADLINE: Duration = Duration::from_secs(60);
const DISK: u64 = 1 << 30;
const UID: u32 = 64_124;

struct Guest {
    calls: Calls,
    vm: Vm,
    volumes: Child,
    dir: tempfile::TempDir,
}

/// Not a test: the volume server, which needs a process of its own. See [`serve_volumes`].
#[test]
#[ignore = "a helper process of the other tests"]
fn volume_server() {
    let root = std::env::var_os("VOLUME_ROOT").expect("started by a test");
    let stream = UnixStream::from(a3s_box_sys::inherit::take(3).unwrap());
    let init = std::env::var_os("VOLUME_INIT").map(|file| fs::read(file).unwrap());
    a3s_box_volume::serve(Path::new(&root), stream, init).unwrap();
}

fn serve_volumes(root: &Path, stream: UnixStream, init: Option<&Path>) -> Child {
    use a3s_box_sys::spawn::Spawn;
    let mut server = Spawn::new(std::env::current_exe().unwrap());
    for arg in ["--exact", "volume_server", "--ignored", "--test-threads=1"] {
        server.arg(arg);
    }
    server.env("VOLUME_ROOT", root);
    if let Some(init) = init {
        server.env("VOLUME_INIT", init);
    }
    server.fd(OwnedFd::from(stream), 3);
    server.start().unwrap()
}

fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest").join(name);
    assert!(path.exists(), "{} is missing: run make build", path.display());
    path
}

fn tap() -> OwnedFd {
    std::thread::spawn(|| {
        a3s_box_sys::namespace::unshare_network().unwrap();
        a3s_box_sys::tap::create("tap0").unwrap()
    })
    .join()
    .unwrap()
}

fn size() -> VmSize {
    VmSize { vcpus: 1, memory_mb: 256 }
}

fn vm_config(start: Start) -> VmConfig {
    VmConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        start,
        size: size(),
        uid: UID,
    }
}

impl Guest {
    async fn boot() -> Self {
        let start = Start::Boot { kernel: built("vmlinuz"), initramfs: built("initramfs") };
        let dir = tempfile::tempdir().unwrap();
        let disk = disk::format(&dir.path().join("disk"), DISK).unwrap();
        Self::start(dir, start, disk, None, None).await
    }

    async fn start(
        dir: tempfile::TempDir,
        start: Start,
        disk: fs::File,
        ram: Option<OwnedFd>,
        init: Option<&Path>,
    ) -> Self {
        make_layer(&dir.path().join("share/images/base"), base);
        fs::create_dir_all(dir.path().join("share/volumes")).unwrap();
        let parts = VmParts {
            config: vm_config(start),
            disk,
            tap: tap(),
            template_ram: ram,
            console_file: dir.path().join("console.log"),
        };
        let (vm, VmStreams { agent, volumes }) = Vm::start(parts).await.unwrap();
        let volumes = serve_volumes(&dir.path().join("share"), volumes, init);
        let mut agent = tokio::net::UnixStream::from_std(agent).unwrap();
        if let Err(error) = wait_hello(&mut agent, DEADLINE).await {
            panic!("{error}\n{}", vm.console_tail());
        }
        Self { calls: Calls(connect(agent).await), vm, volumes, dir }
    }

    async fn configure(
        &mut self,
        request: api::ConfigureSandboxRequest,
    ) -> Result<String, tonic::Status> {
        let answer = within(self.calls.0.configure_sandbox(request)).await;
        answer.map(|answer| answer.into_inner().kernel_release)
    }

    async fn end(mut self) {
        self.vm.kill().await;
        self.volumes.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.volumes.kill().ok();
        self.volumes.wait().ok();
        if std::thread::panicking() {
            eprintln!("console: {}", self.vm.console_tail());
        }
    }
}

fn configuration() -> api::ConfigureSandboxRequest {
    let route = |destination: &str, gateway: &str, scope| api::Route {
        destination: destination.into(),
        gateway: gateway.into(),
        interface: "eth0".into(),
        scope,
        ..api::Route::default()
    };
    api::ConfigureSandboxRequest {
        sandbox_id: id(1),
        now_unix_nanos: 1_900_000_000_000_000_000,
        entropy: vec![7; 64].into(),
        hostname: "web-0".into(),
        network: Some(api::Network {
            interfaces: vec![api::Interface {
                name: "eth0".into(),
                mac: "0a:58:0a:01:00:05".into(),
                mtu: 1450,
                addresses: vec!["10.1.0.5/32".into(), "fd00:1::5/64".into()],
            }],
            routes: vec![
                api::Route { mtu: 1400, ..route("0.0.0.0/0", "169.254.1.1", 0) },
                api::Route { source: "10.1.0.5".into(), ..route("169.254.1.1/32", "", 253) },
                api::Route { onlink: true, ..route("192.168.7.0/24", "10.99.0.1", 0) },
                route("::/0", "fd00:1::1", 0),
            ],
            neighbours: vec![api::Neighbour {
                address: "169.254.1.1".into(),
                mac: "ee:ee:ee:ee:ee:ee".into(),
                interface: "eth0".into(),
            }],
        }),
        dns: Some(api::Dns {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["x.local".into()],
            options: vec![],
        }),
        sysctls: [("net.core.somaxconn".to_owned(), "777".to_owned())].into(),
        shm_bytes: 1 << 20,
        shared_pid_namespace: true,
    }
}

#[tokio::test]
async fn a_guest_becomes_the_sandbox_it_is_told_to_be() {
    let mut guest = Guest::boot().await;
    let release = guest.configure(configuration()).await.unwrap();
    assert!(
        release.starts_with("6.")
            && release != fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim()
    );
    let script = "hostname; date +%s; cat /proc/sys/net/core/somaxconn; cat /etc/resolv.conf
        stat -f -c %b:%s /dev/shm; grep web-0 /etc/hosts; uname -r
        ip addr show eth0; ip route; ip -6 route; ip neigh; ip addr show lo";
    let said = guest.calls.run(shell(1, script)).await;
    let out = &said.stdout;
    assert!(out.starts_with("web-0\n19000000"), "{out}");
    for words in [
        "\n777\n",
        "nameserver 10.0.0.10\nsearch x.local\n",
        "\n256:4096\n",
        "10.1.0.5\tweb-0",
        &release,
        "mtu 1450",
        "0a:58:0a:01:00:05",
        "inet 10.1.0.5/32",
        "inet6 fd00:1::5/64 scope global flags 02",
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 scope link  src 10.1.0.5",
        "192.168.7.0/24 via 10.99.0.1 dev eth0 onlink",
        "default via fd00:1::1 dev eth0",
        "169.254.1.1 dev eth0 lladdr ee:ee:ee:ee:ee:ee",
        "127.0.0.1/8",
    ] {
        assert!(out.contains(words), "{words:?} is not in {out}\n{}", said.stderr);
    }
    assert_eq!(code(guest.configure(configuration()).await).0, Code::FailedPrecondition);
    guest.end().await;
}

#[tokio::test]
async fn limits_are_the_kernels_and_running_out_of_memory_is_told() {
    let mut guest = Guest::boot().await;
    guest.configure(configuration()).await.unwrap();
    let resources = json!({
        "memory": { "limit": 33_554_432, "swap": 33_554_432 },
        "cpu": { "shares": 512, "quota": 50_000, "period": 100_000 },
        "pids": { "limit": 20 },
        "unified": { "memory.oom.group": "1" },
    });
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight pids.max memory.oom.group memory.swap.max 2>/dev/null";
    let said = guest.calls.run(shell(1, files).with("/linux/resources", resources.clone())).await;
    assert!(said.stdout.starts_with("33554432\n50000 100000\n"), "{said:?}");
    assert!(said.stdout.contains("\n20\n1\n"), "{said:?}");

    let eat = "x=a; while :; do x=$x$x$x$x; done";
    let said = guest.calls.run(shell(2, eat).with("/linux/resources", resources.clone())).await;
    assert_eq!(
        (said.exit.code, said.exit.signal, said.exit.oom_killed),
        (137, 9, true),
        "{said:?}"
    );
    let mut events =
        within(guest.calls.0.events(api::EventsRequest {})).await.unwrap().into_inner();
    loop {
        let event = within(events.message()).await.unwrap().unwrap();
        if matches!(&event.kind, Some(api::event::Kind::ContainerOom(oom)) if oom.container_id == id(2))
        {
            break;
        }
    }
    drop(events);

    // A child's death for want of memory is told too, though init lives on.
    let one = json!({ "memory": { "limit": 33_554_432 } });
    let script = format!("sh -c '{eat}'; echo child: $?");
    let said = guest.calls.run(shell(3, &script).with("/linux/resources", one)).await;
    assert_eq!(
        (said.stdout.as_str(), said.exit.code, said.exit.oom_killed),
        ("child: 137\n", 0, true),
        "{said:?}"
    );

    let many = "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done";
    let said = guest.calls.run(shell(4, many).with("/linux/resources", resources)).await;
    assert!(said.stderr.contains("fork"), "{said:?}");

    let said = guest
        .calls
        .run(shell(
            5,
            "mknod /tmp/d b 254 0; head -c 1 /tmp/d; mknod /tmp/z c 1 5; head -c 2 /tmp/z | wc -c",
        ))
        .await;
    assert!(
        said.stderr.contains("/tmp/d: Operation not permitted") && said.stdout == "2\n",
        "{said:?}"
    );
    let open = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
    let privileged =
        shell(6, "mknod /tmp/d b 254 0; head -c 1 /tmp/d | wc -c").with("/linux/resources", open);
    assert_eq!(guest.calls.run(privileged).await.stdout, "1\n");
    guest.end().await;
}

#[tokio::test]
async fn a_failing_configuration_names_the_field() {
    let mut guest = Guest::boot().await;
    let mut request = configuration();
    request.sysctls.insert("kernel.nothing".into(), "1".into());
    let (_, text) = code(guest.configure(request).await);
    assert!(text.contains("sysctl kernel.nothing = 1: no such file or directory"), "{text}");
    guest.end().await;
}

#[tokio::test]
async fn volumes_are_live_in_both_directions() {
    let mut guest = Guest::boot().await;
    guest.configure(configuration()).await.unwrap();
    let volume = guest.dir.path().join("share/volumes").join(id(1)).join("0");
    fs::create_dir_all(&volume).unwrap();
    let source = PathBuf::from("/share/volumes").join(id(1)).join("0");
    guest
        .calls
        .create(program(1, &["sleep", "1000"]).bind(&source, "/data", &["rbind"]))
        .await
        .unwrap();
    guest.calls.start(1).await.unwrap();
    fs::write(volume.join("from-host"), "host").unwrap();
    let said = guest
        .calls
        .exec(1, &["sh", "-c", "cat /data/from-host; echo guest > /data/from-guest"])
        .await
        .unwrap();
    assert_eq!(said.stdout, "host", "{said:?}");
    assert_eq!(fs::read_to_string(volume.join("from-guest")).unwrap(), "guest\n");
    guest.calls.remove(1).await.unwrap();
    guest.end().await;
}

#[tokio::test]
async fn clones_of_one_template_become_different_sandboxes() {
    let dir = tempfile::tempdir().unwrap();
    let template = build_template(dir.path()).await;
    for name in ["one", "two"] {
        let mut guest = clone_of(&template).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i64;
        let request = api::ConfigureSandboxRequest {
            hostname: name.into(),
            now_unix_nanos: now,
            ..configuration()
        };
        guest.configure(request).await.unwrap();
        let said = guest
            .calls
            .run(shell(1, "hostname; echo x > /file; ip addr show eth0 | grep -c 10.1.0.5"))
            .await;
        assert_eq!((said.stdout, said.exit.code), (format!("{name}\n1\n"), 0), "{}", said.stderr);
        assert!((said.exit.exited_at - now).abs() < 60_000_000_000, "the clock is the host's");
        guest.end().await;
    }
}

async fn build_template(dir: &Path) -> template::Template {
    let config = template::TemplateConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        kernel: built("vmlinuz"),
        initramfs: built("initramfs"),
        size: size(),
        uid: UID,
        disk_bytes: DISK,
        dir: dir.join("template"),
    };
    template::build(&config, tap(), |volumes| async move {
        tokio::task::spawn_blocking(move || a3s_box_volume::handshake(&volumes)).await?
    })
    .await
    .unwrap();
    template::Template::open(&config.dir).unwrap()
}

async fn clone_of(template: &template::Template) -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let disk = fs::File::open(template.dir().join(template::DISK_FILE)).unwrap();
    let disk = disk::copy_sparse(&disk, &dir.path().join("disk")).unwrap();
    let start = Start::Clone { template: template.dir().to_owned() };
    let init = template.dir().join("fuse_init.bin");
    Guest::start(dir, start, disk, Some(template.ram().unwrap()), Some(&init)).await
}

/// Prints what the steps of a container cost in a clone: `cargo test -p a3s-box-agent --test guest
/// -- --ignored times --nocapture`.
#[tokio::test]
#[ignore = "a measurement"]
async fn times_of_a_containers_steps() {
    let dir = tempfile::tempdir().unwrap();
    let template = build_template(dir.path()).await;
    let mut guest = clone_of(&template).await;
    let begun = Instant::now();
    let mut last = begun;
    let mut lap = move |what: &str| {
        println!("{:>8.1} ms  {what}", last.elapsed().as_secs_f64() * 1e3);
        last = Instant::now();
    };
    guest.configure(configuration()).await.unwrap();
    lap("ConfigureSandbox");
    for number in 1..=4 {
        guest.calls.create(program(number, &["sleep", "1000"])).await.unwrap();
        lap(&format!("CreateContainer {number}"));
        guest.calls.start(number).await.unwrap();
        lap(&format!("StartContainer {number}"));
        for _ in 0..3 {
            guest.calls.exec(number, &["true"]).await.unwrap();
            lap("Exec true");
        }
    }
    let said = guest.calls.run(shell(9, "echo x")).await;
    lap("create, attach, start, echo, exit");
    assert_eq!(said.stdout, "x\n");
    guest.calls.remove(9).await.unwrap();
    lap("RemoveContainer");
    guest.end().await;
}
