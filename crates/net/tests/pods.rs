//! Pods on a real CNI network with the distribution's plugins. Needs root.
//!
//! Each test's node is a network namespace of its own, as when the server itself was started in one:
//! no test sees another's bridge, addresses or firewall rules.

#![allow(clippy::unwrap_used)]

use a3s_box_net::{Attachment, Cni, PortMapping, Protocol, bridge, netns, tap};
use a3s_box_types::{SandboxId, network::Route};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const CONFLIST: &str = r#"{
  "cniVersion": "1.0.0", "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "br0", "isGateway": true, "ipMasq": true, "mtu": 1400, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "DATA", "routes": [{"dst": "0.0.0.0/0"}],
              "ranges": [[{"subnet": "10.88.7.0/24"}]]}},
    {"type": "portmap", "capabilities": {"portMappings": true}},
    {"type": "loopback"}
  ]
}"#;

/// A node with the network `pods`.
struct Node {
    folder: PathBuf,
    cni: Cni,
}

/// Runs the test on a thread in a network namespace of its own.
fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce(Node) -> F + Send + 'static) {
    let node = std::thread::spawn(move || {
        a3s_box_sys::namespace::unshare_network().unwrap();
        run("ip link set lo up");
        let folder = tempfile::tempdir().unwrap();
        let config = CONFLIST.replace("DATA", &folder.path().join("ips").display().to_string());
        fs::write(folder.path().join("10-pods.conflist"), config).unwrap();
        let plugins = [PathBuf::from("/opt/cni/bin"), "/usr/lib/cni".into()];
        let records = folder.path().join("records");
        let cni = Cni::new(folder.path(), &plugins, &records, Duration::from_secs(60)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Node { folder: folder.path().to_owned(), cni }));
    });
    if let Err(panic) = node.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A pod's namespace, removed with it.
struct Pod {
    id: SandboxId,
    netns: PathBuf,
}

impl Pod {
    fn new() -> Self {
        let mut random = [0; 32];
        File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
        let id = SandboxId::from_random(random);
        Self { netns: netns::create(&id).unwrap(), id }
    }

    fn attachment(&self, host_port: Option<u16>) -> Attachment {
        let mapping = |host_port| PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port,
            host_ip: None,
        };
        Attachment {
            sandbox_id: self.id.clone(),
            netns: self.netns.clone(),
            network: None,
            pod_namespace: "default".to_owned(),
            pod_name: "web".to_owned(),
            pod_uid: "u".to_owned(),
            port_mappings: host_port.map(mapping).into_iter().collect(),
            dns: None,
            bandwidth: None,
            cgroup_path: String::new(),
        }
    }

    /// Inside the pod's namespace, on a thread of its own.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let namespace = File::open(&self.netns).unwrap();
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    /// Answers one TCP connection on port 80 with this text.
    fn serve_once(&self, text: &'static str) -> std::thread::JoinHandle<()> {
        let listener = self.inside(|| TcpListener::bind("0.0.0.0:80").unwrap());
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(text.as_bytes()).unwrap())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        netns::remove(&self.id).unwrap();
    }
}

fn run(command: &str) -> String {
    let words: Vec<_> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn ask(address: impl Into<IpAddr>, port: u16) -> String {
    let mut answer = String::new();
    TcpStream::connect((address.into(), port)).unwrap().read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn pods_have_addresses_that_the_node_and_other_pods_reach_and_leave_nothing_behind() {
    on_a_node(|node| async move {
        let nothing = (run("ip -o link"), run("iptables-save -t nat"));
        let (a, b) = (Pod::new(), Pod::new());
        let ip_a = node.cni.add(&a.attachment(Some(8080))).await.unwrap().ips[0];
        let ip_b = node.cni.add(&b.attachment(None)).await.unwrap().ips[0];
        assert_ne!(ip_a, ip_b);

        let served = a.serve_once("from a");
        assert_eq!(ask(ip_a, 80), "from a");
        served.join().unwrap();
        let served = a.serve_once("to b");
        assert_eq!(b.inside(|| ask(ip_a, 80)), "to b");
        served.join().unwrap();
        let served = a.serve_once("by host port");
        assert_eq!(ask([127, 0, 0, 1], 8080), "by host port");
        served.join().unwrap();

        node.cni.del(&a.id).await.unwrap();
        node.cni.del(&b.id).await.unwrap();
        node.cni.del(&b.id).await.unwrap();
        run("ip link del br0");
        assert_eq!(run("ip -o link"), nothing.0);
        let rules = run("iptables-save -t nat");
        for left in [ip_a.to_string(), ip_b.to_string(), a.id.to_string(), "8080".to_owned()] {
            assert!(!rules.contains(&left), "{left} in {rules}");
        }
        let leases = fs::read_dir(node.folder.join("ips/pods")).unwrap();
        let leases: Vec<_> = leases.map(|entry| entry.unwrap().file_name()).collect();
        assert!(leases.iter().all(|name| !name.to_string_lossy().starts_with("10.")), "{leases:?}");
    });
}

#[test]
fn addresses_are_given_back_after_the_namespace_is_gone() {
    on_a_node(|node| async move {
        let pod = Pod::new();
        let ip = node.cni.add(&pod.attachment(Some(8081))).await.unwrap().ips[0];
        netns::remove(&pod.id).unwrap();
        node.cni.del(&pod.id).await.unwrap();
        assert!(!node.folder.join(format!("ips/pods/{ip}")).exists());
        assert!(!run("iptables-save -t nat").contains("8081"));
    });
}

/// Reads frames from the tap until one is wanted. Each is behind a virtio-net header.
async fn frame(tap: &mut File, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = [0; 2048];
    loop {
        match tap.read(&mut buffer) {
            Ok(length) if wanted(&buffer[10..length]) => return buffer[10..length].to_vec(),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::task::yield_now().await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn frames_for_the_pod_reach_the_tap_and_the_guest_answers_in_the_pods_place() {
    on_a_node(|node| async move {
        let pod = Pod::new();
        let mut cable = File::from(tap::create(&pod.netns).unwrap());
        let ip = node.cni.add(&pod.attachment(None)).await.unwrap().ips[0];
        for _ in 0..2 {
            // Repeated, as after a crash.
            bridge::join(&pod.netns, "eth0", tap::NAME).await.unwrap();
        }
        let network = bridge::guest_network(&pod.netns, "eth0").await.unwrap();
        let mtu = pod.inside(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        assert!(mtu.contains("tap0:"), "{mtu}");
        assert!(pod.inside(|| run("ip -o link show tap0")).contains("mtu 1400"));

        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.connect((ip, 7)).unwrap();
        socket.send(b"echo").unwrap();
        let arp = |frame: &[u8]| frame[12..14] == [8, 6] && frame[21] == 1;
        let question = frame(&mut cable, arp).await;
        let mac: Vec<u8> = network.interfaces[0]
            .mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        // Sender and target change places; nobody else answered.
        let mut answer = vec![0; 10];
        answer.extend([&question[6..12], &mac, &question[12..21], &[2], &mac].concat());
        answer.extend([&question[38..42], &question[22..32]].concat());
        cable.write_all(&answer).unwrap();
        let udp = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 17;
        let mut echo = frame(&mut cable, udp).await;
        // MAC addresses, IP addresses, ports; no checksum minds the order.
        for (at, length) in [(0, 6), (26, 4), (34, 2)] {
            echo[at..at + 2 * length].rotate_left(length);
        }
        cable.write_all(&[vec![0; 10], echo].concat()).unwrap();
        let mut answer = [0; 16];
        let length = socket.recv(&mut answer).unwrap();
        assert_eq!(&answer[..length], b"echo");
        node.cni.del(&pod.id).await.unwrap();
    });
}

#[test]
fn the_guest_is_told_all_that_the_namespace_knows() {
    on_a_node(|_| async move {
        let pod = Pod::new();
        pod.inside(|| {
            for command in [
                "ip link add eth0 mtu 1450 type veth peer name other",
                "ip link set eth0 address 0a:58:0a:f4:00:05",
                "ip link set other up",
                "ip link set eth0 up",
                "ip address add 10.1.2.3/32 dev eth0",
                "ip -6 address add fd00::3/64 dev eth0 nodad",
                "ip route add 169.254.1.1 dev eth0 scope link",
                "ip route add default via 169.254.1.1 dev eth0 src 10.1.2.3 mtu 1400",
                "ip route add 10.9.0.0/16 via 10.200.0.1 dev eth0 onlink",
                "ip -6 route add default via fd00::1 dev eth0",
                "ip route add 10.8.0.0/16 dev eth0 table 7",
                "ip neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
                "ip neigh add 10.1.2.9 lladdr ee:ee:ee:ee:ee:e9 dev eth0 nud reachable",
                "ip link add eth1 type veth peer name more",
                "ip address add 10.5.0.1/24 dev eth1",
            ] {
                run(command);
            }
        });
        let network = bridge::guest_network(&pod.netns, "eth0").await.unwrap();
        let interface = &network.interfaces[0];
        assert_eq!((interface.mac.as_str(), interface.mtu), ("0a:58:0a:f4:00:05", 1450));
        assert_eq!(interface.addresses, ["10.1.2.3/32", "fd00::3/64"]);
        let route = |destination: &str, gateway: Option<&str>| Route {
            destination: destination.to_owned(),
            gateway: gateway.map(str::to_owned),
            interface: "eth0".to_owned(),
            source: None,
            mtu: None,
            scope: 0,
            onlink: false,
        };
        assert_eq!(
            network.routes,
            [
                Route {
                    source: Some("10.1.2.3".to_owned()),
                    mtu: Some(1400),
                    ..route("0.0.0.0/0", Some("169.254.1.1"))
                },
                Route { onlink: true, ..route("10.9.0.0/16", Some("10.200.0.1")) },
                Route { scope: 253, ..route("169.254.1.1/32", None) },
                route("::/0", Some("fd00::1")),
            ]
        );
        assert_eq!(network.neighbours.len(), 1);
        assert_eq!(network.neighbours[0].address, "169.254.1.1");
        assert_eq!(network.neighbours[0].mac, "ee:ee:ee:ee:ee:ee");
        let error = bridge::guest_network(&pod.netns, "eth9").await.unwrap_err().to_string();
        assert!(error.ends_with("has no interface eth9"), "{error}");
    });
}

#[test]
fn a_namespace_is_made_once_listed_and_removed_for_good() {
    let pod = Pod::new();
    assert!(netns::list().unwrap().contains(&pod.id));
    assert!(netns::create(&pod.id).is_err());
    assert_ne!(
        pod.inside(|| fs::read_link("/proc/thread-self/ns/net").unwrap()),
        fs::read_link("/proc/thread-self/ns/net").unwrap()
    );
    netns::remove(&pod.id).unwrap();
    assert!(!Path::new(&pod.netns).exists());
    assert!(!netns::list().unwrap().contains(&pod.id));
    netns::remove(&pod.id).unwrap();
}
