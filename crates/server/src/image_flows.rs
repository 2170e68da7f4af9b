//! The image RPCs as a client sees them, over a store of two images.

use crate::{
    Server,
    config::{Config, beside::Beside},
    image_fs_info::image_fs_info,
    image_list::list_images,
    image_pull::pull_image,
    image_remove::remove_image,
    image_status::image_status,
    images::{Auth, Image, ImageRpcError, ImageStore, Usage},
    serve::streaming_server,
    status::Failure,
};
use a3s_box_api::cri;
use std::sync::{Arc, Mutex};
use tonic::Code;

/// Keeps images by tag, and what pulls were asked with.
#[derive(Default)]
struct FakeStore {
    images: Mutex<Vec<Image>>,
    asked: Mutex<Vec<Option<Auth>>>,
}

fn image(id: &str, tag: &str, user: &str) -> Image {
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {"User": user},
        "rootfs": {"type": "layers", "diff_ids": []},
    });
    Image {
        id: id.to_owned(),
        repo_tags: vec![tag.to_owned()],
        repo_digests: vec![format!("{tag}@sha256:0")],
        size: 7,
        config: serde_json::from_value(config).unwrap(),
        layers: vec!["/layer".into()],
        pinned: false,
    }
}

#[tonic::async_trait]
impl ImageStore for FakeStore {
    fn list(&self) -> Vec<Image> {
        self.images.lock().unwrap().clone()
    }

    fn resolve(&self, name: &str) -> Option<Image> {
        self.list().into_iter().find(|image| image.id == name || image.repo_tags[0] == name)
    }

    async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Image, ImageRpcError> {
        self.asked.lock().unwrap().push(auth);
        self.resolve(reference).ok_or_else(|| ImageRpcError::Store {
            step: format!("pull {reference}"),
            code: Code::NotFound,
            source: "no such manifest".into(),
        })
    }

    async fn remove(&self, name: &str) -> Result<(), ImageRpcError> {
        let gone = self.resolve(name).map(|image| image.id);
        self.images.lock().unwrap().retain(|image| Some(&image.id) != gone.as_ref());
        Ok(())
    }

    fn fetched_bytes(&self) -> u64 {
        7
    }

    async fn usage(&self) -> Result<Usage, ImageRpcError> {
        Ok(Usage { bytes: 14, inodes: 2 })
    }
}

struct Node {
    folder: tempfile::TempDir,
    server: Arc<Server>,
    store: Arc<FakeStore>,
}

async fn node() -> Node {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::parse("", &Beside::folder(folder.path())).unwrap();
    config.root = folder.path().join("root");
    config.state = folder.path().join("state");
    let store = Arc::new(FakeStore::default());
    store
        .images
        .lock()
        .unwrap()
        .extend([image("sha256:1", "a:1", "1003:5"), image("sha256:2", "b:1", "")]);
    let streaming = streaming_server(&config).await.unwrap();
    let opened = Server::open(config, streaming.urls()).unwrap();
    let server = Server { images: store.clone(), ..opened };
    Node { folder, server: Arc::new(server), store }
}

fn spec(name: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec { image: name.to_owned(), ..Default::default() })
}

async fn list(node: &Node, name: &str) -> Vec<String> {
    let filter = Some(cri::ImageFilter { image: spec(name) });
    let answer = list_images(node.server.clone(), cri::ListImagesRequest { filter }).await.unwrap();
    answer.images.into_iter().map(|image| image.id).collect()
}

#[tokio::test]
async fn lists_are_filtered_by_any_name_of_the_image() {
    let node = node().await;
    assert_eq!(list(&node, "").await, ["sha256:1", "sha256:2"]);
    assert_eq!(list(&node, "b:1").await, ["sha256:2"]);
    assert!(list(&node, "c").await.is_empty());
}

#[tokio::test]
async fn status_tells_the_user_and_when_asked_the_whole_config() {
    let node = node().await;
    let ask = |name: &str, verbose| {
        let request = cri::ImageStatusRequest { image: spec(name), verbose };
        image_status(node.server.clone(), request)
    };
    let answer = ask("a:1", false).await.unwrap();
    assert_eq!(answer.image.unwrap().uid, Some(cri::Int64Value { value: 1003 }));
    assert!(answer.info.is_empty());
    let answer = ask("b:1", true).await.unwrap();
    assert_eq!(answer.image.unwrap().uid, None);
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    assert_eq!(info["imageSpec"]["architecture"], "amd64");
    assert!(ask("c", true).await.unwrap().image.is_none());
    assert_eq!(ask("", false).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_pull_passes_credentials_on_and_answers_the_id() {
    let node = node().await;
    let pull = |name: &str, auth| {
        let request = cri::PullImageRequest { image: spec(name), auth, ..Default::default() };
        pull_image(node.server.clone(), request)
    };
    let auth = cri::AuthConfig { username: "u".into(), password: "p".into(), ..Default::default() };
    assert_eq!(pull("a:1", Some(auth)).await.unwrap().image_ref, "sha256:1");
    let error = pull("c", None).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    let asked = node.store.asked.lock().unwrap();
    assert_eq!(asked[0].as_ref().unwrap().username, "u");
    assert!(asked[1].is_none());
}

#[tokio::test]
async fn removing_an_image_twice_succeeds() {
    let node = node().await;
    for _ in 0..2 {
        let request = cri::RemoveImageRequest { image: spec("a:1") };
        remove_image(node.server.clone(), request).await.unwrap();
    }
    assert_eq!(list(&node, "").await, ["sha256:2"]);
}

#[tokio::test]
async fn images_and_containers_are_told_to_share_one_file_system() {
    let node = node().await;
    let disk = node.folder.path().join("root/sandboxes/x/disk.ext4");
    std::fs::create_dir_all(disk.parent().unwrap()).unwrap();
    std::fs::write(disk, vec![1; 1 << 20]).unwrap();
    let answer = image_fs_info(node.server.clone(), cri::ImageFsInfoRequest {}).await.unwrap();
    let (images, containers) = (&answer.image_filesystems[0], &answer.container_filesystems[0]);
    assert_eq!(images.fs_id, containers.fs_id);
    assert_eq!(images.used_bytes.unwrap().value, 14);
    assert!(containers.used_bytes.unwrap().value >= 1 << 20);
}
