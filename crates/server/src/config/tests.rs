use super::*;

fn parse(text: &str) -> Result<Config, Problems> {
    Config::parse(text, &Beside::folder(Path::new("/nowhere/bin")))
}

fn problems(text: &str) -> Vec<String> {
    parse(text).unwrap_err().0.iter().map(Problem::to_string).collect()
}

#[test]
fn the_printed_defaults_are_the_defaults() {
    assert_eq!(parse(DEFAULT), parse(""));
}

#[test]
fn what_is_commented_out_in_the_printed_defaults_is_a_key_too() {
    let keys = [
        "shim",
        "agent",
        "registry_config",
        "kernel",
        "initramfs",
        "tls_certificate",
        "tls_key",
        "tls_client_ca",
    ];
    let text = keys.iter().fold(DEFAULT.to_owned(), |text, key| {
        assert!(text.contains(&format!("# {key} = ")), "{key}");
        text.replace(&format!("# {key} = "), &format!("{key} = "))
    });
    let config = parse(&text).unwrap();
    assert_eq!(config.image.registry_config, Some("/etc/a3s-box/certs.d".into()));
    assert_eq!(config.vm.kernel, Path::new("/usr/lib/a3s-box/vmlinuz"));
}

#[test]
fn every_key_of_the_file_has_its_effect() {
    let defaults = parse("").unwrap();
    let lines = [
        "socket = '/x'",
        "root = '/x'",
        "state = '/x'",
        "log = 'debug'",
        "shim = '/x'",
        "agent = '/x'",
        "image.registry_config = '/x'",
        "network.conf_dir = '/x'",
        "network.bin_dirs = ['/x']",
        "network.plugin_timeout_ms = 7",
        "streaming.address = '127.0.0.1:7'",
        "streaming.advertised = 'http://x'",
        "streaming.idle_timeout_ms = 7",
        "streaming.creation_timeout_ms = 7",
        "streaming.tls_certificate = '/x'\nstreaming.tls_key = '/x'",
        "metrics.address = '127.0.0.1:7'",
        "vm.accel = 'tcg'",
        "vm.start = 'boot'",
        "vm.qemu = '/x'",
        "vm.kernel = '/x'",
        "vm.initramfs = '/x'",
        "vm.default_vcpus = 2",
        "vm.default_memory_mb = 1024",
        "vm.max_vcpus = 2",
        "vm.max_memory_mb = 1024",
        "vm.min_memory_mb = 256",
        "vm.guest_overhead_mb = 32",
        "vm.disk_mb = 7",
        "vm.uid_base = 7",
        "vm.uid_count = 7",
        "vm.template_timeout_ms = 7",
        "vm.kvm_probe_timeout_ms = 7",
        "vm.start_timeout_ms = 7",
        "handlers.more = {}",
        "handlers.\"\".host_namespaces = 'refuse'",
        "handlers.a3s-box.host_namespaces = 'allow'",
    ];
    for line in lines {
        assert_ne!(parse(line).unwrap(), defaults, "{line}");
    }
}

#[test]
fn all_problems_are_told_at_once_with_their_lines() {
    let text = "soket = '/x'\nroot = 'relative'\n[vm]\naccel = 'fast'\ndefault_vcpus = 0\n\
                memory = 1\n[network]\nbin_dirs = []\n[handlers.x]\nhost_namespaces = 'shared-kernel'\n";
    assert_eq!(
        problems(text),
        [
            "line 1: soket: is not a key of this configuration",
            "line 2: root: \"relative\" is not an absolute path",
            "line 4: vm.accel: \"fast\" is not one of \"auto\", \"kvm\", \"tcg\"",
            "line 5: vm.default_vcpus: 0 is not a positive number of this kind",
            "line 6: vm.memory: is not a key of this configuration",
            "line 8: network.bin_dirs: is empty",
            "line 10: handlers.x.host_namespaces: \"shared-kernel\" is not one of \"allow\", \"refuse\"",
        ]
    );
}

#[test]
fn tls_is_whole_or_not_there() {
    let missing =
        |name| [format!("streaming.tls_{name}: is missing: TLS needs a certificate and its key")];
    assert_eq!(problems("streaming.tls_certificate = '/x'"), missing("key"));
    assert_eq!(problems("streaming.tls_key = '/x'"), missing("certificate"));
    assert_eq!(problems("streaming.tls_client_ca = '/x'"), missing("certificate"));
    let files = ["certificate", "key", "client_ca"].map(|name| format!("tls_{name} = '/{name}'"));
    let tls = parse(&format!("[streaming]\n{}", files.join("\n"))).unwrap().streaming.tls;
    assert_eq!(tls.unwrap().client_ca, Some("/client_ca".into()));
}

#[test]
fn keys_that_contradict_each_other_are_a_problem() {
    let text =
        "[vm]\ndefault_vcpus = 3\nmax_vcpus = 2\ndefault_memory_mb = 64\nuid_base = 4294967295";
    let keys: Vec<_> = parse(text).unwrap_err().0.into_iter().map(|problem| problem.key).collect();
    assert_eq!(keys, ["vm.default_vcpus", "vm.default_memory_mb", "vm.uid_count"]);
}

#[test]
fn broken_toml_is_told_with_its_line_and_does_not_hide_other_problems() {
    let problems = problems("root = \n[vm]\naccel = 'fast'\n");
    assert!(problems[0].starts_with("line 1: "), "{problems:?}");
    assert!(problems.iter().any(|problem| problem.contains("vm.accel")), "{problems:?}");
}

#[test]
fn both_standard_handlers_exist_whatever_the_file_says() {
    let config = parse("[handlers.gold]").unwrap();
    let handlers: Vec<_> =
        config.handlers.iter().map(|(name, handler)| (&**name, handler.host_namespaces)).collect();
    let expected = [
        ("", HostNamespaces::Allow),
        ("a3s-box", HostNamespaces::Refuse),
        ("gold", HostNamespaces::Refuse),
    ];
    assert_eq!(handlers, expected);
}

#[test]
fn shim_and_guest_are_found_beside_the_program() {
    let tree = tempfile::tempdir().unwrap();
    let (bin, installed) = (tree.path().join("bin"), tree.path().join("lib/a3s-box"));
    let beside = Beside::folder(&bin);
    assert_eq!(beside.shim(), bin.join("a3s-box-shim"));
    assert_eq!(beside.agent(), bin.join("a3s-box-agent"));
    assert_eq!(beside.guest("vmlinuz"), tree.path().join("guest/vmlinuz"));
    std::fs::create_dir_all(&installed).unwrap();
    std::fs::write(installed.join("vmlinuz"), "").unwrap();
    assert_eq!(beside.guest("vmlinuz"), installed.join("vmlinuz"));
}
