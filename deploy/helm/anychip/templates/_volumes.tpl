{{/* The root is read-only: what the server writes has a volume. */}}
{{- define "anychip.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: /cache
- name: shared-memory
  mountPath: /dev/shm
{{- if .Values.apiKeys.secretName }}
- name: keys
  mountPath: /etc/anychip/keys
  readOnly: true
{{- end }}
{{- if .Values.tls.secretName }}
- name: tls
  mountPath: /etc/anychip/tls
  readOnly: true
{{- end }}
{{- with .Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "anychip.volumes" -}}
- name: tmp
  emptyDir: {}
- name: cache
{{- if or .Values.cache.existingClaim .Values.cache.size }}
  persistentVolumeClaim:
    claimName: {{ .Values.cache.existingClaim | default (printf "%s-cache" (include "anychip.name" .)) }}
{{- else }}
  emptyDir: {}
{{- end }}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory }}
{{- if .Values.apiKeys.secretName }}
- name: keys
  secret:
    secretName: {{ .Values.apiKeys.secretName }}
    items:
      - key: {{ .Values.apiKeys.key }}
        path: keys
{{- end }}
{{- if .Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ .Values.tls.secretName }}
{{- end }}
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
