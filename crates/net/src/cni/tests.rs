use super::*;
use std::{fs, os::unix::fs::PermissionsExt};

/// A node whose plugins are shell scripts that keep a diary.
struct Node {
    folder: tempfile::TempDir,
    netns: PathBuf,
}

const PLUGIN: &str = r#"#!/bin/sh
input=$(cat)
echo "$CNI_COMMAND NAME $input" >> "DIARY"
if [ -f "FOLDER/NAME.$CNI_COMMAND" ]; then . "FOLDER/NAME.$CNI_COMMAND"; fi
if [ $CNI_COMMAND = ADD ]; then
  echo '{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/x"}],
         "ips":[{"address":"fd00::2/64","interface":1},{"address":"10.9.0.2/24","interface":1},
                {"address":"10.9.0.1/24","interface":0}],"dns":{"nameservers":["10.9.0.1"]},"by":"NAME"}'
fi
"#;

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["bin", "net.d"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let node = Self { folder, netns: "/proc/self/ns/net".into() };
        node.plugin("first");
        node.plugin("second");
        node.config("10-a.conflist", "a", &["first", "second"]);
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn plugin(&self, name: &str) {
        let script = PLUGIN
            .replace("NAME", name)
            .replace("DIARY", &self.path("diary").display().to_string())
            .replace("FOLDER", &self.folder.path().display().to_string());
        let path = self.path("bin").join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What the plugin does from now on instead of answering.
    fn instead(&self, plugin: &str, command: &str, script: &str) {
        fs::write(self.path(&format!("{plugin}.{command}")), script).unwrap();
    }

    fn config(&self, file: &str, name: &str, plugins: &[&str]) {
        let plugins: Vec<_> = plugins
            .iter()
            .map(|plugin| json!({"type": plugin, "capabilities": {"portMappings": *plugin == "second"}}))
            .collect();
        let config = json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins});
        fs::write(self.path("net.d").join(file), config.to_string()).unwrap();
    }

    fn cni(&self) -> Cni {
        let second = Duration::from_secs(1);
        Cni::new(&self.path("net.d"), &[self.path("bin")], &self.path("cni"), second).unwrap()
    }

    fn pod(&self) -> Attachment {
        Attachment {
            sandbox_id: SandboxId::from_random([7; 32]),
            netns: self.netns.clone(),
            network: None,
            pod_namespace: "default".to_owned(),
            pod_name: "web".to_owned(),
            pod_uid: "u".to_owned(),
            port_mappings: vec![PortMapping {
                protocol: Protocol::Tcp,
                container_port: 80,
                host_port: 8080,
                host_ip: None,
            }],
            dns: None,
            bandwidth: None,
            cgroup_path: String::new(),
        }
    }

    /// Commands and plugins in the order they were run.
    fn diary(&self) -> Vec<String> {
        let diary = fs::read_to_string(self.path("diary")).unwrap_or_default();
        diary
            .lines()
            .map(|line| line.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" "))
            .collect()
    }

    /// The n-th input.
    fn input(&self, at: usize) -> Value {
        let diary = fs::read_to_string(self.path("diary")).unwrap();
        serde_json::from_str(diary.lines().nth(at).unwrap().splitn(3, ' ').last().unwrap()).unwrap()
    }
}

#[tokio::test]
async fn plugins_run_in_order_each_told_the_result_before_it_and_del_runs_backwards() {
    let node = Node::new();
    let cni = node.cni();
    let attached = cni.add(&node.pod()).await.unwrap();
    assert_eq!(attached.ips, ["10.9.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
    assert_eq!(attached.dns.servers, ["10.9.0.1"]);
    cni.del(&node.pod().sandbox_id).await.unwrap();
    assert_eq!(node.diary(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
    assert!(node.input(0).get("prevResult").is_none());
    assert_eq!(node.input(1)["prevResult"]["by"], "first");
    assert_eq!(node.input(2)["prevResult"]["by"], "second");
    assert_eq!(node.input(1)["name"], "a");
    assert!(cni.list().unwrap().is_empty());
}

#[tokio::test]
async fn a_plugin_is_told_only_what_it_asks_for() {
    let node = Node::new();
    node.cni().add(&node.pod()).await.unwrap();
    assert!(node.input(0).get("runtimeConfig").is_none());
    assert_eq!(
        node.input(1)["runtimeConfig"],
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]})
    );
}

#[tokio::test]
async fn the_nodes_subnets_are_told_to_who_asks_for_them_and_survive_a_restart() {
    let node = Node::new();
    let plugins = json!([{"type": "first", "capabilities": {"ipRanges": true}}]);
    let config = json!({"cniVersion": "1.0.0", "name": "a", "plugins": plugins});
    fs::write(node.path("net.d/10-a.conflist"), config.to_string()).unwrap();
    assert!(node.cni().asks_for("ipRanges").unwrap());
    node.cni().set_ip_ranges(vec!["10.1.0.0/24".into(), "fd00::/64".into()]).unwrap();
    node.cni().add(&node.pod()).await.unwrap();
    assert_eq!(
        node.input(0)["runtimeConfig"],
        json!({"ipRanges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]})
    );
}

#[tokio::test]
async fn del_asks_the_plugins_that_add_asked_whatever_the_configuration_says_now() {
    let node = Node::new();
    node.cni().add(&node.pod()).await.unwrap();
    node.config("10-a.conflist", "b", &["first"]);
    node.cni().del(&node.pod().sandbox_id).await.unwrap();
    assert_eq!(node.diary()[2..], ["DEL second", "DEL first"]);
    assert_eq!(node.input(3)["name"], "a");
}

#[tokio::test]
async fn a_failed_add_is_taken_back_from_all_plugins_and_del_may_be_repeated() {
    let node = Node::new();
    node.instead(
        "second",
        "ADD",
        r#"echo '{"code":11,"msg":"no free port","details":"8080"}'; exit 1"#,
    );
    let error = node.cni().add(&node.pod()).await.unwrap_err().to_string();
    assert_eq!(error, "CNI plugin \"second\", ADD for network \"a\": no free port; 8080");
    node.cni().del(&node.pod().sandbox_id).await.unwrap();
    node.cni().del(&node.pod().sandbox_id).await.unwrap();
    assert_eq!(node.diary(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
}

#[tokio::test]
async fn del_goes_on_after_a_plugin_failed_and_is_owed_until_all_succeed() {
    let node = Node::new();
    let (cni, id) = (node.cni(), node.pod().sandbox_id);
    cni.add(&node.pod()).await.unwrap();
    node.instead("second", "DEL", "echo out of luck >&2; exit 3");
    let error = cni.del(&id).await.unwrap_err().to_string();
    assert!(error.ends_with("exit code 3: out of luck"), "{error}");
    assert_eq!(node.diary().last().unwrap(), "DEL first");
    assert_eq!(cni.list().unwrap(), std::slice::from_ref(&id));
    node.instead("second", "DEL", "");
    cni.del(&id).await.unwrap();
    assert!(cni.list().unwrap().is_empty());
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_children() {
    let node = Node::new();
    let pid = node.path("pid");
    node.instead("first", "ADD", &format!("sleep 1000 & echo $! > {}; wait", pid.display()));
    let error = node.cni().add(&node.pod()).await.unwrap_err();
    assert!(matches!(error, NetError::Timeout { .. }), "{error}");
    let child = fs::read_to_string(pid).unwrap();
    // The kernel takes its time with a killed process; one that was not killed never ends.
    let runs = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    };
    while runs() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_a_plugin_answers_is_not_believed() {
    let node = Node::new();
    for (script, why) in [
        ("echo nonsense; exit 0", "its answer is not JSON: expected ident at line 1 column 2"),
        ("echo '[]'; exit 0", "its answer is not an object"),
        ("kill -9 $$", "killed by signal 9"),
        ("echo '{}'; exit 0", "its result has no address for eth0"),
        (
            r#"echo '{"ips":[{"address":"10.0.0.1/8","interface":3}]}'; exit 0"#,
            "its result names an interface that is not there",
        ),
        (
            r#"echo '{"ips":[{"address":"10.0.0.256/8"}]}'; exit 0"#,
            "its result has the address \"10.0.0.256/8\"",
        ),
    ] {
        node.instead("second", "ADD", script);
        let error = node.cni().add(&node.pod()).await.unwrap_err().to_string();
        assert_eq!(error, format!("CNI plugin \"second\", ADD for network \"a\": {why}"));
    }
}

#[tokio::test]
async fn del_waits_for_a_plugin_that_a_dead_server_left_running() {
    let node = Node::new();
    let (begun, go) = (node.path("begun"), node.path("go"));
    let wait =
        format!("touch {}; until [ -f {} ]; do sleep 0.01; done", begun.display(), go.display());
    node.instead("first", "ADD", &wait);
    let id = node.pod().sandbox_id;
    // What a dead server leaves: the record, and a plugin that holds the lock.
    let cni = node.cni();
    let request = Request {
        network: Network::find(&node.path("net.d"), None).unwrap(),
        attachment: node.pod(),
        ip_ranges: Vec::new(),
    };
    cni.records.put(id.as_str(), REQUEST, &request).unwrap();
    let lock = cni.lock(id.as_str()).await.unwrap();
    let mut orphan = std::process::Command::new(node.path("bin/first"))
        .env("CNI_COMMAND", "ADD")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(lock.file.try_clone().unwrap())
        .spawn()
        .unwrap();
    drop(lock);
    while !begun.exists() {
        tokio::task::yield_now().await;
    }
    let del = cni.del(&id);
    tokio::pin!(del);
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut del).await.is_err());
    assert_eq!(node.diary(), ["ADD first"]);
    fs::write(go, "").unwrap();
    del.await.unwrap();
    assert_eq!(node.diary(), ["ADD first", "DEL second", "DEL first"]);
    orphan.wait().unwrap();
}

#[tokio::test]
async fn the_first_file_is_the_default_and_others_are_found_by_name() {
    let node = Node::new();
    node.config("05-b.conflist", "b", &["first"]);
    fs::write(node.path("net.d/01-ignored.txt"), "{").unwrap();
    assert_eq!(node.cni().ready().unwrap(), "b");
    let pod = Attachment { network: Some("a".to_owned()), ..node.pod() };
    assert_eq!(node.cni().add(&pod).await.unwrap().network, "a");
    let pod = Attachment { network: Some("c".to_owned()), ..node.pod() };
    let error = node.cni().add(&pod).await.unwrap_err().to_string();
    assert!(
        error.starts_with("no CNI network \"c\" in ") && error.ends_with("there is b, a"),
        "{error}"
    );
}

#[test]
fn the_network_is_ready_when_its_configuration_and_its_plugins_are_there() {
    let node = Node::new();
    let error = || node.cni().ready().unwrap_err().to_string();
    node.cni().ready().unwrap();
    fs::remove_file(node.path("bin/second")).unwrap();
    assert!(error().starts_with("CNI plugin \"second\" is not in "), "{}", error());
    fs::write(node.path("net.d/00.conflist"), "{").unwrap();
    assert!(error().contains("00.conflist: EOF"), "{}", error());
    fs::remove_dir_all(node.path("net.d")).unwrap();
    assert!(error().starts_with("no CNI network configuration in "), "{}", error());
}

#[test]
fn configurations_that_mean_nothing_say_why() {
    let read = |config: Value, list| Network::read(config.as_object().unwrap().clone(), list);
    let plugin = json!({"type": "x"});
    for (config, why) in [
        (json!({}), "name is missing"),
        (json!({"name": "../x"}), "name \"../x\" is not made of letters, digits, _ . -"),
        (
            json!({"name": "x"}),
            "cniVersion [\"0.1.0\"] has none of [\"0.3.0\", \"0.3.1\", \"0.4.0\", \"1.0.0\", \"1.1.0\"]",
        ),
        (json!({"name": "x", "cniVersion": "1.0.0"}), "plugins is missing"),
        (json!({"name": "x", "cniVersion": "1.0.0", "plugins": []}), "plugins is empty"),
        (json!({"name": "x", "cniVersion": "1.0.0", "plugins": [1]}), "a plugin is not an object"),
        (
            json!({"name": "x", "cniVersion": "1.0.0", "plugins": [plugin, {"type": "../sh"}]}),
            "plugin 1: type \"../sh\" is not a program's name",
        ),
    ] {
        assert_eq!(read(config, true).unwrap_err(), why);
    }
    let single = read(json!({"name": "x", "cniVersion": "0.3.1", "type": "y"}), false);
    assert_eq!(single.unwrap().programs(), ["y"]);
}

#[test]
fn a_name_cannot_smuggle_arguments_to_a_plugin() {
    let node = Node::new();
    let pod = Attachment { pod_name: "a;K8S_POD_UID=b".to_owned(), ..node.pod() };
    assert!(matches!(arguments(&pod), Err(NetError::Argument(_))));
}
