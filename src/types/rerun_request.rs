//! The body of `POST /v1/fine_tuning/jobs/{id}/rerun`: what the new job has other than the old one.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::job::Metadata;
use super::job_spec::{Invalid, JobSpec, check_metadata, check_suffix, read};

/// What the new job has other than the old one; everything else about it is the same. Unknown fields are refused.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RerunFineTuningJobRequest)]
pub struct RerunRequest {
    /// Part of the model's name in the place of the old one; null: none.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub suffix: Option<Option<String>>,
    /// Labels in the place of the old ones; null: none.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Metadata>)]
    pub metadata: Option<Option<Metadata>>,
}

/// A field that is there, though it be null.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl RerunRequest {
    /// Checks a request's body, which may be empty or null.
    ///
    /// # Errors
    /// The first field that is unknown, of the wrong type or out of range.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        if body.is_empty() {
            return Ok(Self::default());
        }
        let request = read::<Option<Self>>(body)?.unwrap_or_default();
        if let Some(Some(suffix)) = &request.suffix {
            check_suffix(suffix)?;
        }
        if let Some(Some(metadata)) = &request.metadata {
            check_metadata(metadata)?;
        }
        Ok(request)
    }

    /// The new job's specification.
    pub fn apply(self, old: JobSpec) -> JobSpec {
        let Self { suffix, metadata } = self;
        JobSpec { suffix: suffix.unwrap_or(old.suffix), metadata: metadata.unwrap_or(old.metadata), ..old }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_null_takes_away_and_an_absent_field_keeps() {
        let body = json!({"model": "tiny", "training_file": crate::types::ids::FileId::new(), "suffix": "a",
            "metadata": {"team": "b"}, "seed": 7});
        let old = JobSpec::parse(body.to_string().as_bytes(), None).expect("a good request");
        let apply = |body: &str| RerunRequest::parse(body.as_bytes()).expect("a good request").apply(old.clone());
        for same in ["", "{}", "null"] {
            assert_eq!(apply(same), old);
        }
        assert_eq!(apply(r#"{"suffix": null}"#), JobSpec { suffix: None, ..old.clone() });
        assert_eq!(apply(r#"{"suffix": "c"}"#), JobSpec { suffix: Some("c".into()), ..old.clone() });
        assert_eq!(apply(r#"{"metadata": null}"#), JobSpec { metadata: None, ..old.clone() });
        for (body, param) in [
            (r#"{"seed": 1}"#, Some("seed")),
            (r#"{"suffix": "a b"}"#, Some("suffix")),
            (r#"{"suffix": 1}"#, Some("suffix")),
            (r#"{"metadata": {"a": 1}}"#, Some("metadata.a")),
            ("1", None),
            ("{", None),
        ] {
            let invalid = RerunRequest::parse(body.as_bytes()).expect_err("must be refused");
            assert_eq!(invalid.param.as_deref(), param, "{body}: {invalid}");
        }
    }
}
