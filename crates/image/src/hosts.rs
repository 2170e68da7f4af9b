//! Which hosts to ask for an image: containerd's `certs.d/HOST/hosts.toml`, and Docker's certificate files.
//!
//! The folder for a host is the first that exists of `HOST_PORT_`, `HOST:PORT` and `_default`. Its mirrors
//! are asked in the order of the file, then the `server`, which is the image's own registry unless the file
//! says otherwise. The file is read at each pull, so a change needs no restart.

use crate::ImageError;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};
use toml::{Table, Value};
use url::Url;

const DOCKER: &str = "docker.io";
const DOCKER_REGISTRY: &str = "registry-1.docker.io";
const API: &str = "/v2";

/// A registry to ask, and how.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Host {
    /// Where its API is, without a slash at the end: `https://x.y/v2`.
    pub base: Url,
    /// Nobody said whether it speaks TLS; a loopback registry may not.
    pub ambiguous: bool,
    /// May be asked what a tag means.
    pub resolve: bool,
    /// May be asked for content.
    pub pull: bool,
    /// Its certificate is not checked.
    pub skip_verify: bool,
    /// Further certificate authorities (PEM).
    pub ca: Vec<PathBuf>,
    /// Certificates to show it, each with its key unless that is in the same file (PEM).
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    /// Sent with each request.
    pub headers: HeaderMap,
    /// It stands in for another registry and is told which (`?ns=`).
    pub proxy: bool,
}

/// The hosts for images of `registry` (as in a reference), the image's own last.
pub(crate) fn hosts(folder: Option<&Path>, registry: &str) -> Result<Vec<Host>, ImageError> {
    let Some(folder) = folder.and_then(|root| find(root, registry)) else {
        return Ok(vec![default_host(registry)]);
    };
    let file = folder.join("hosts.toml");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut host = default_host(registry);
            docker_certificates(&folder, &mut host)?;
            return Ok(vec![host]);
        }
        Err(error) => return Err(ImageError::io("read", file, error)),
    };
    read(&text, &folder, registry).map_err(|why| ImageError::RegistryConfig { path: file, why })
}

fn find(root: &Path, registry: &str) -> Option<PathBuf> {
    let (name, port) = split_port(registry);
    let under = port.map(|port| format!("{name}_{port}_"));
    under
        .iter()
        .map(String::as_str)
        .chain([registry, "_default"])
        .map(|name| root.join(name))
        .find(|folder| folder.is_dir())
}

fn split_port(registry: &str) -> (&str, Option<&str>) {
    match registry.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (registry, None),
    }
}

/// A registry on this machine; containerd trusts such a one without a certificate.
fn is_loopback(registry: &str) -> bool {
    let name = split_port(registry).0;
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The registry itself, without any configuration.
fn default_host(registry: &str) -> Host {
    let address = if registry == DOCKER { DOCKER_REGISTRY } else { registry };
    let loopback = is_loopback(address);
    let port = split_port(address).1;
    let scheme = if loopback && port == Some("80") { "http" } else { "https" };
    Host {
        // `Reference` has checked that the registry makes a URL.
        base: Url::parse(&format!("{scheme}://{address}{API}")).unwrap_or_else(|_| blank()),
        ambiguous: loopback && !matches!(port, None | Some("80" | "443")),
        resolve: true,
        pull: true,
        skip_verify: loopback && port != Some("80"),
        ca: Vec::new(),
        client: Vec::new(),
        headers: HeaderMap::new(),
        proxy: false,
    }
}

fn blank() -> Url {
    Url::parse("https://invalid./v2").expect("a constant that is a URL")
}

fn read(text: &str, folder: &Path, registry: &str) -> Result<Vec<Host>, String> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| error.to_string())?;
    let mut hosts = Vec::new();
    match table.get("host") {
        None => {}
        Some(Value::Table(mirrors)) => {
            for (address, settings) in mirrors {
                let settings =
                    settings.as_table().ok_or_else(|| format!("host.{address:?} is no table"))?;
                let host = host(address, settings, folder, registry)
                    .map_err(|why| format!("host.{address:?}: {why}"))?;
                hosts.push(host);
            }
        }
        Some(_) => return Err("host is no table".into()),
    }
    let server = match table.get("server") {
        Some(value) => {
            let address = value.as_str().ok_or("server is no string")?;
            host(address, &table, folder, registry).map_err(|why| format!("server: {why}"))?
        }
        None => settings(default_host(registry), &table, folder)?,
    };
    // A mirror that is also the server is asked once, with the mirror's settings.
    if !hosts.iter().any(|host| host.base == server.base) {
        hosts.push(server);
    }
    Ok(hosts)
}

fn host(address: &str, table: &Table, folder: &Path, registry: &str) -> Result<Host, String> {
    let text =
        if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let mut base = Url::parse(&text).map_err(|error| error.to_string())?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err("it is no http or https address".into());
    }
    if !base.username().is_empty() || base.password().is_some() || base.query().is_some() {
        return Err("an address here has no user and no query".into());
    }
    let path = base.path().trim_end_matches('/').to_owned();
    let as_is = boolean(table, "override_path")?.unwrap_or(false);
    base.set_path(&if as_is || path.ends_with(API) { path } else { path + API });
    let own = if registry == DOCKER { DOCKER_REGISTRY } else { registry };
    let address = match base.port() {
        Some(port) => format!("{}:{port}", base.host_str().unwrap_or_default()),
        None => base.host_str().unwrap_or_default().to_owned(),
    };
    let bare = Host {
        proxy: address != own && address != registry,
        ambiguous: false,
        skip_verify: false,
        base,
        ..default_host(registry)
    };
    settings(bare, table, folder)
}

fn settings(mut host: Host, table: &Table, folder: &Path) -> Result<Host, String> {
    if let Some(value) = table.get("capabilities") {
        let names = strings(value).ok_or("capabilities is no list of strings")?;
        if let Some(odd) = names.iter().find(|name| !matches!(**name, "pull" | "resolve" | "push"))
        {
            return Err(format!("capability {odd:?} is not one of pull, resolve, push"));
        }
        host.pull = names.contains(&"pull");
        host.resolve = names.contains(&"resolve");
    }
    if let Some(skip) = boolean(table, "skip_verify")? {
        host.skip_verify = skip;
    }
    if let Some(value) = table.get("ca") {
        let files = strings(value).ok_or("ca is no file name or list of them")?;
        host.ca = files.into_iter().map(|file| folder.join(file)).collect();
    }
    if let Some(value) = table.get("client") {
        host.client = client(value, folder)
            .ok_or("client is no file name, list of them, or list of pairs")?;
    }
    if let Some(value) = table.get("header") {
        let headers = value.as_table().ok_or("header is no table")?;
        for (name, value) in headers {
            let bad = || format!("header {name:?} cannot be sent");
            let key = HeaderName::try_from(name).map_err(|_| bad())?;
            for value in strings(value).ok_or_else(bad)? {
                host.headers.append(&key, HeaderValue::try_from(value).map_err(|_| bad())?);
            }
        }
    }
    Ok(host)
}

fn boolean(table: &Table, key: &str) -> Result<Option<bool>, String> {
    match table.get(key) {
        None => Ok(None),
        Some(Value::Boolean(value)) => Ok(Some(*value)),
        Some(_) => Err(format!("{key} is neither true nor false")),
    }
}

/// One string or a list of them.
fn strings(value: &Value) -> Option<Vec<&str>> {
    match value {
        Value::String(text) => Some(vec![text]),
        Value::Array(values) => values.iter().map(Value::as_str).collect(),
        _ => None,
    }
}

/// `"both.pem"`, `["both.pem", …]` or `[["cert.pem", "key.pem"], …]`.
fn client(value: &Value, folder: &Path) -> Option<Vec<(PathBuf, Option<PathBuf>)>> {
    let one = |value: &Value| match value {
        Value::String(file) => Some((folder.join(file), None)),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(file)] => Some((folder.join(file), None)),
            [Value::String(file), Value::String(key)] => {
                Some((folder.join(file), Some(folder.join(key)).filter(|_| !key.is_empty())))
            }
            _ => None,
        },
        _ => None,
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        other => Some(vec![one(other)?]),
    }
}

/// Docker's layout: `*.crt` are authorities, `*.cert` with `*.key` are shown to the registry.
fn docker_certificates(folder: &Path, host: &mut Host) -> Result<(), ImageError> {
    let read = |error| ImageError::io("read", folder, error);
    let mut files = fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
        .map_err(read)?;
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.is_file() {
                    return Err(ImageError::RegistryConfig {
                        path: file,
                        why: "there is no key file beside this certificate".into(),
                    });
                }
                host.client.push((file, Some(key)));
            }
            _ => {}
        }
    }
    // With certificates of its own the registry surely speaks TLS, and is checked.
    if !host.ca.is_empty() || !host.client.is_empty() {
        host.ambiguous = false;
        host.skip_verify = false;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_str()).collect()
    }

    fn parsed(registry: &str, text: &str) -> Result<Vec<Host>, String> {
        read(text, Path::new("/certs"), registry)
    }

    #[test]
    fn without_configuration_the_registry_itself_is_asked() {
        let one = |registry| hosts(None, registry).unwrap().remove(0);
        assert_eq!(one("docker.io").base.as_str(), "https://registry-1.docker.io/v2");
        assert!(!one("docker.io").proxy && !one("docker.io").ambiguous);
        assert_eq!(one("gcr.io").base.as_str(), "https://gcr.io/v2");
        assert_eq!(one("10.0.0.1:5000").base.as_str(), "https://10.0.0.1:5000/v2");
        assert!(!one("10.0.0.1:5000").ambiguous && !one("10.0.0.1:5000").skip_verify);
        for loopback in ["localhost:5000", "127.0.0.1:5000", "[::1]:5000"] {
            assert!(one(loopback).ambiguous, "{loopback}");
        }
        assert_eq!(one("localhost:80").base.as_str(), "http://localhost/v2");
        assert!(!one("localhost").ambiguous);
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."https://z.example"]
            capabilities = ["pull"]
            [host."http://a.example:5000/some/where"]
            skip_verify = true
            [host."https://b.example/registry"]
            override_path = true
            [host."https://c.example/v2/"]
            header.X-Key = ["one", "two"]
            ca = "ca.pem"
            client = [["a.cert", "a.key"], ["b.pem", ""]]
        "#;
        let hosts = parsed("docker.io", text).unwrap();
        assert_eq!(
            bases(&hosts),
            [
                "https://z.example/v2",
                "http://a.example:5000/some/where/v2",
                "https://b.example/registry",
                "https://c.example/v2",
                "https://registry-1.docker.io/v2",
            ]
        );
        assert!(hosts[0].pull && !hosts[0].resolve && hosts[1].skip_verify);
        assert!(hosts[..4].iter().all(|host| host.proxy) && !hosts[4].proxy);
        assert_eq!(hosts[3].headers.get_all("x-key").iter().count(), 2);
        assert_eq!(hosts[3].ca, [Path::new("/certs/ca.pem")]);
        assert_eq!(
            hosts[3].client,
            [("/certs/a.cert".into(), Some("/certs/a.key".into())), ("/certs/b.pem".into(), None)]
        );
    }

    #[test]
    fn without_a_server_the_registry_itself_comes_last_and_never_twice() {
        let hosts = parsed("x.example", "[host.\"http://127.0.0.1:5000\"]\n").unwrap();
        assert_eq!(bases(&hosts), ["http://127.0.0.1:5000/v2", "https://x.example/v2"]);
        let hosts =
            parsed("x.example", "[host.\"https://x.example\"]\nskip_verify = true\n").unwrap();
        assert_eq!(bases(&hosts), ["https://x.example/v2"]);
        assert!(hosts[0].skip_verify && !hosts[0].proxy);
        let hosts = parsed("x.example", "server = \"http://other.example\"\n").unwrap();
        assert!(bases(&hosts) == ["http://other.example/v2"] && hosts[0].proxy);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("server = 3", "server"),
            ("host = 3", "host"),
            ("[host.\"ftp://x\"]", "ftp"),
            ("[host.\"https://u:p@x\"]", "user"),
            ("capabilities = [\"fly\"]", "fly"),
            ("skip_verify = \"yes\"", "skip_verify"),
            ("client = 1", "client"),
            ("[header]\n\"a b\" = \"c\"", "a b"),
            ("server = ", "expected"),
        ] {
            let why = parsed("x.example", text).unwrap_err();
            assert!(why.contains(part), "{text}: {why}");
        }
    }

    #[test]
    fn the_most_exact_folder_is_used_and_docker_certificates_too() {
        let root = tempfile::tempdir().unwrap();
        let mirror = |name: &str, mirror: &str| {
            fs::create_dir(root.path().join(name)).unwrap();
            let text = format!("[host.\"https://{mirror}\"]\n");
            fs::write(root.path().join(name).join("hosts.toml"), text).unwrap();
        };
        mirror("_default", "default.example");
        mirror("a.example:5000", "colon.example");
        let first =
            |registry| hosts(Some(root.path()), registry).unwrap().remove(0).base.to_string();
        assert_eq!(first("b.example"), "https://default.example/v2");
        assert_eq!(first("a.example:5000"), "https://colon.example/v2");
        mirror("a.example_5000_", "underscore.example");
        assert_eq!(first("a.example:5000"), "https://underscore.example/v2");

        let folder = root.path().join("127.0.0.1:7000");
        fs::create_dir(&folder).unwrap();
        for file in ["a.crt", "b.cert", "b.key"] {
            fs::write(folder.join(file), "").unwrap();
        }
        let host = hosts(Some(root.path()), "127.0.0.1:7000").unwrap().remove(0);
        assert_eq!((host.ca.len(), host.client.len()), (1, 1));
        assert!(!host.ambiguous && !host.skip_verify);
        fs::remove_file(folder.join("b.key")).unwrap();
        assert!(hosts(Some(root.path()), "127.0.0.1:7000").is_err());
    }
}
