//! Ids: a prefix and a UUIDv7, spelled the same in the API, the database, the log and storage keys.

use super::text::stored_as_text;

macro_rules! id {
    ($(#[$meta:meta])* $name:ident, $prefix:literal) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// What every id of this kind starts with.
            pub const PREFIX: &'static str = $prefix;

            /// A fresh id; later ones sort after earlier ones.
            #[expect(clippy::new_without_default, reason = "two fresh ids differ, so there is no default")]
            pub fn new() -> Self {
                Self(uuid::Uuid::now_v7())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(formatter, concat!($prefix, "{}"), self.0.as_simple())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let hex = text.strip_prefix($prefix).filter(|hex| hex.len() == 32);
                let lower = hex.filter(|hex| !hex.contains(|c: char| c.is_ascii_uppercase()));
                let id = lower.and_then(|hex| uuid::Uuid::try_parse(hex).ok()).map(Self);
                id.ok_or_else(|| format!("must be `{}` and 32 hexadecimal digits, got `{text}`", $prefix))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        stored_as_text!($name);
    };
}

id!(
    /// A file that was uploaded, or that a job made.
    FileId,
    "file-"
);
id!(
    /// A file that comes in parts.
    UploadId,
    "upload_"
);
id!(
    /// A part of it.
    PartId,
    "part_"
);
id!(
    /// A fine-tuning job.
    JobId,
    "ftjob-"
);
id!(
    /// One line of a job's story.
    EventId,
    "ftevent-"
);
id!(
    /// A state of a training that it can go on from.
    CheckpointId,
    "ftckpt_"
);
id!(
    /// A file that a job leaves to take away.
    ArtifactId,
    "artifact-"
);
id!(
    /// One worker process's try at a task.
    AttemptId,
    "attempt-"
);

id!(
    /// A key that callers show.
    KeyId,
    "key_"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_and_nothing_else_does() {
        let id = JobId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(serde_json::from_str::<JobId>(&format!("\"{id}\"")).expect("an id"), id);
        let upper = id.to_string().to_uppercase();
        let dashed = format!("ftjob-{}", uuid::Uuid::nil());
        for wrong in ["", "ftjob-", "file-0190", "ftjob-../../etc/passwd", upper.as_str(), dashed.as_str()] {
            assert!(wrong.parse::<JobId>().is_err(), "{wrong} is no job id");
        }
    }

    #[test]
    fn later_ids_sort_after_earlier_ones() {
        let ids: Vec<String> = (0..1000).map(|_| JobId::new().to_string()).collect();
        assert!(ids.is_sorted());
    }
}
