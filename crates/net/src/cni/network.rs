//! CNI configuration files: which networks the node has, and of which plugins each consists.

use crate::NetError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Versions of the specification that differ in nothing this program does, oldest first.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One network: a list of plugins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Network {
    pub name: String,
    pub version: String,
    pub plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// The network of this name; without one, the first in the order of file names.
    ///
    /// A file that means nothing stops the search for the default: the next one would silently be
    /// another network than the node's owner meant.
    pub fn find(folder: &Path, name: Option<&str>) -> Result<Self, NetError> {
        let files = files(folder)?;
        let Some(name) = name else {
            let first = files.first().ok_or_else(|| NetError::NoConfig(folder.to_owned()))?;
            return Self::load(first);
        };
        let mut known = Vec::new();
        for file in &files {
            match Self::load(file) {
                Ok(network) if network.name == name => return Ok(network),
                Ok(network) => known.push(network.name),
                Err(error) => known.push(format!("({error})")),
            }
        }
        Err(NetError::NoNetwork { name: name.to_owned(), folder: folder.to_owned(), known })
    }

    /// The programs of its plugins, those for addresses included.
    pub fn programs(&self) -> Vec<String> {
        let mut programs: Vec<_> = self.plugins.iter().map(program).collect();
        let ipam =
            self.plugins.iter().filter_map(|plugin| plugin.get("ipam")?.get("type")?.as_str());
        programs.splice(0..0, ipam.filter(|name| !name.is_empty()).map(str::to_owned));
        programs
    }

    pub fn tells_del_the_result(&self) -> bool {
        !self.version.starts_with("0.3.")
    }

    fn load(path: &Path) -> Result<Self, NetError> {
        let text = fs::read(path).map_err(NetError::io("read", path))?;
        let wrong = |why: String| NetError::Config { path: path.to_owned(), why };
        let config: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let list = path.extension().is_some_and(|extension| extension == "conflist");
        Self::read(config, list).map_err(wrong)
    }

    pub(super) fn read(config: Map<String, Value>, list: bool) -> Result<Self, String> {
        let name = match config.get("name").and_then(Value::as_str) {
            Some(name) if good_name(name) => name.to_owned(),
            Some(name) => {
                return Err(format!("name {name:?} is not made of letters, digits, _ . -"));
            }
            None => return Err("name is missing".to_owned()),
        };
        let version = version(&config)?;
        let plugins = if list {
            let plugins = config.get("plugins").and_then(Value::as_array);
            let plugins = plugins.ok_or_else(|| "plugins is missing".to_owned())?;
            plugins.iter().map(|plugin| plugin.as_object().cloned()).collect::<Option<Vec<_>>>()
        } else {
            Some(vec![config])
        };
        let plugins = plugins.ok_or_else(|| "a plugin is not an object".to_owned())?;
        if plugins.is_empty() {
            return Err("plugins is empty".to_owned());
        }
        for (at, plugin) in plugins.iter().enumerate() {
            let program = program(plugin);
            if program.is_empty() || program.contains('/') {
                return Err(format!("plugin {at}: type {program:?} is not a program's name"));
            }
        }
        Ok(Self { name, version, plugins })
    }
}

/// The newest version both sides speak.
fn version(config: &Map<String, Value>) -> Result<String, String> {
    let mut offered: Vec<&str> = Vec::new();
    if let Some(Value::Array(list)) = config.get("cniVersions") {
        offered.extend(list.iter().filter_map(Value::as_str));
    }
    // The specification's meaning of none.
    offered.push(config.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0"));
    let best = VERSIONS.iter().rev().find(|version| offered.contains(version));
    best.map(|version| (*version).to_owned())
        .ok_or_else(|| format!("cniVersion {offered:?} has none of {VERSIONS:?}"))
}

/// The program of one plugin; empty when it says none.
pub(super) fn program(plugin: &Map<String, Value>) -> String {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Whether the plugin takes this from its caller.
pub(super) fn asks_for(plugin: &Map<String, Value>, capability: &str) -> bool {
    let asked = plugin.get("capabilities").and_then(|asked| asked.get(capability));
    asked.and_then(Value::as_bool) == Some(true)
}

fn good_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// The folder's configuration files in the order of their names.
fn files(folder: &Path) -> Result<Vec<PathBuf>, NetError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetError::io("list", folder)(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(NetError::io("list", folder))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conf" | "conflist" | "json")) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
